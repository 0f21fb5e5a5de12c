"""A run's stages on disk: which are done, what each needs, and one supervised loop that can be interrupted.

<run_dir>/synthesis/     sft.jsonl preferences.jsonl hard.jsonl repairs.jsonl synthesis.json
<run_dir>/sft/           metrics.jsonl policy/
<run_dir>/reward_model/  metrics.jsonl metrics.json model/
<run_dir>/grpo/          as `run_folder`
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from autotraj.errors import RunError, UserError
from autotraj.home import Home
from autotraj.interrupt import Interrupt
from autotraj.run_folder import Checkpoint, RunFolder
from learners.config import LearnerConfig, LoraConfig
from learners.errors import LearnerError
from learners.group import LearnerGroup
from trajectory.storage import Storage

SYNTHESIS, SFT, REWARD_MODEL, GRPO = "synthesis", "sft", "reward_model", "grpo"
SFT_FILE, PREFERENCES_FILE = "sft.jsonl", "preferences.jsonl"


class Interrupted(Exception):
    """The person asked to stop; what was reached is on disk."""


def require(path: Path, made_by: str) -> Path:
    """`path`, or UserError with the command that makes it."""
    if not path.exists():
        raise UserError(f"{path} isn't there; make it with `python -m autotraj {made_by}` on the same configuration")
    return path


def require_model(home: Home, *names: str, made_by: str) -> str:
    """Where actors find a model of this run's, or UserError with the command that makes it."""
    if not home.has_model(*names):
        require(home.path.joinpath(*names, "config.json"), made_by)
    return home.model(*names)


def num_steps(num_items: int, batch_size: int, epochs: int) -> int:
    return epochs * math.ceil(num_items / batch_size)


def batches(num_items: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Indices of every step's items: each epoch goes through all once, in an order of its own."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_items).tolist()
        for start in range(0, num_items, batch_size):
            yield order[start : start + batch_size]


def learner_config(
    base: LearnerConfig, *, model: str, lr: float, steps: int, warmup_ratio: float, lora: LoraConfig | None, head: str
) -> LearnerConfig:
    """The run's learners for a supervised stage: the same gang, another objective."""
    changes = {
        "model": model,
        "lr": lr,
        "schedule": "cosine" if steps > 1 else "constant",
        "total_steps": steps if steps > 1 else None,
        "warmup_steps": min(round(warmup_ratio * steps), steps - 1),
        "num_minibatches": 1,
        "weight_sync": "host",
        "lora": lora,
        "head": head,
    }
    # Validated anew: `model_copy` would let contradictions through.
    return LearnerConfig.model_validate(base.model_dump() | changes)


def export(group: LearnerGroup, path: Path | Storage) -> None:
    """Writes the Hugging Face model whole, or leaves the one that is there; at a URI that one goes before the new comes.

    Raises RunError.
    """
    try:
        _export(group, path)
    except (OSError, LearnerError) as error:
        raise RunError(
            f"the model {path} could not be written: {error}; mend that and go on from the last checkpoint"
        ) from error


def _export(group: LearnerGroup, path: Path | Storage) -> None:
    if isinstance(path, Storage):
        group.export_hf(path)
        return
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    group.export_hf(partial.resolve())
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def supervised(
    group: LearnerGroup,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    plan: Iterator[list[int]],
    step: Callable[[list[int]], Mapping[str, float]],
    *,
    interrupt: Interrupt,
    checkpoint_every: int,
    on_step: Callable[[int, Mapping[str, float]], bool],
) -> None:
    """Takes the steps of `plan`, from `checkpoint` on if there is one, until the plan or `on_step`'s patience ends.

    `on_step(number, metrics)` returns whether to stop. Raises Interrupted, after writing a checkpoint, if a person asked.
    """
    done = 0
    if checkpoint is not None:
        group.restore_from_path(checkpoint.learners)
        done = checkpoint.step
    for number, indices in enumerate(plan, start=1):
        if number <= done:
            continue
        metrics = dict(step(indices))
        folder.write_metrics(number, metrics)
        if on_step(number, metrics):
            return
        if interrupt.requested or number % checkpoint_every == 0:
            folder.checkpoint(number, lambda _, learners: group.save_to_path(learners), keep=1)
        if interrupt.requested:
            raise Interrupted
