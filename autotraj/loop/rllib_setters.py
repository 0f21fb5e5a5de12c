"""Refuses RLlib's own setters, most of which GRPO doesn't read, with a sentence that says what to set instead.

The list is read from `AlgorithmConfig` itself, so that setters of a newer Ray are refused, too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any, Self, TypeVar

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

NO_SETTERS = frozenset({"copy", "update_from_dict", "get_config_for_module"})
"""Methods that return a configuration without being setters."""

CALLBACKS = frozenset({"on_algorithm_init", "on_checkpoint_loaded", "on_train_result"})
"""The callbacks that the algorithm calls. The others are for gym episodes, or for RLlib's own env runners and evaluation."""

INSTEAD: Mapping[str, str] = {
    "api_stack": "GRPO always runs on the new API stack",
    "callbacks": f"GRPO calls {', '.join(sorted(CALLBACKS))} alone, which are given as functions",
    "checkpointing": "grpo.checkpoint_every and grpo.keep_checkpoints of the RunConfig say when a run writes them",
    "debugging": "set seed in the RunConfig given to run(); messages go to Python's logging",
    "env_runners": "the sections rollout, engine and elastic of the RunConfig given to run() say it",
    "environment": "the sections data and episode of the RunConfig given to run() say it",
    "evaluation": "the section eval of the RunConfig given to run() says it, and autotraj.launch.evaluate_engines evaluates",
    "exploration": "episode.temperature of the RunConfig given to run() says it",
    "experimental": "RLlib's experiments don't reach GRPO",
    "fault_tolerance": "lost actors are always replaced; the section grpo of the RunConfig given to run() says how often "
    "and how soon",
    "framework": "the learners are DeepSpeed's, in PyTorch; see the section learner of the RunConfig given to run()",
    "learners": "the section learner of the RunConfig given to run() says it",
    "multi_agent": "GRPO trains one policy",
    "offline_data": "the section data of the RunConfig given to run() says where questions come from, sft what is imitated",
    "python_environment": "set the job's runtime environment with ray.init or `python -m autotraj submit`",
    "reporting": "one train() is one optimizer step; see the section grpo of the RunConfig given to run()",
    "resources": "the sections rollout, learner, repair and scorer of the RunConfig given to run() say it",
    "rl_module": "model of the RunConfig given to run() names the policy",
    "rollouts": "the section rollout of the RunConfig given to run() says it",
    "training": "the sections learner, loss and grpo of the RunConfig given to run() say it",
}
"""Setter → where to set instead what it would set. This file's test finds setters of RLlib that are missing here."""

ELSEWHERE = "only what the RunConfig given to run() says is read"

C = TypeVar("C", bound=type[AlgorithmConfig])


def setters() -> list[str]:
    """The names of `AlgorithmConfig`'s setters: public methods that return the configuration, and those that once did."""
    found = []
    for name, member in inspect.getmembers(AlgorithmConfig, inspect.isfunction):
        returned = inspect.signature(member).return_annotation
        if (returned in (Self, "Self") or name in INSTEAD) and not name.startswith("_") and name not in NO_SETTERS:
            found.append(name)
    return found


def refuses_setters(*, but: Collection[str] = ()) -> Any:
    """A class decorator. While the attribute `refuses` is true, all of RLlib's setters except those in `but` raise
    ValueError for any setting. RLlib itself calls them in its constructor, and on copies of an algorithm's
    configuration."""

    def decorate(cls: C) -> C:
        for name in setters():
            if name not in but:
                setattr(cls, name, _refusing(name))
        return cls

    return decorate


def refusal(setter: str, settings: Collection[str]) -> ValueError:
    return ValueError(f"GRPOConfig.{setter}({', '.join(settings)}) would be ignored: {INSTEAD.get(setter, ELSEWHERE)}")


def _refusing(name: str) -> Any:
    original = getattr(AlgorithmConfig, name)
    names = [parameter for parameter in inspect.signature(original).parameters if parameter != "self"]

    @functools.wraps(original)
    def setter(self: Any, *positional: Any, **settings: Any) -> AlgorithmConfig:
        if not self.refuses:
            made: AlgorithmConfig = original(self, *positional, **settings)
            return made
        if given := [*names[: len(positional)], *settings]:
            raise refusal(name, given)
        return self

    return setter
