"""A run's stages on disk: which are done and what each needs; and the loop of supervised training.

<run_dir>/synthesis/     sft.jsonl preferences.jsonl hard.jsonl repairs.jsonl synthesis.json
<run_dir>/sft/           metrics.jsonl policy/
<run_dir>/reward_model/  metrics.jsonl metrics.json model/
<run_dir>/grpo/          see `run_folder.folder`
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autotraj.config.run import RunConfig
from autotraj.config.stage_registry import STAGES
from autotraj.errors import RunError, UserError
from autotraj.interrupt import Interrupt
from autotraj.run_folder.claim import check_held
from autotraj.run_folder.folder import Checkpoint, RunFolder
from autotraj.run_folder.location import RunLocation
from autotraj.training.replacement import Replacements
from autotraj.training.skips import Skips
from learners.config import LearnerConfig, LoraConfig
from learners.errors import LearnerDied, LearnerError, LearnerTimeout
from storage.objects import Storage, StorageError
from storage.whole import replacing, write_whole

if TYPE_CHECKING:
    from learners.group import LearnerGroup  # torch and Ray: seconds

STAGES_FILE = "stages.json"


class Interrupted(Exception):
    """The user asked to stop. What was done until then is on disk."""


def read_done(folder: Path) -> dict[str, Any]:
    """The figures of each stage that is done, from `stages.json` in a run's folder. Raises UserError if it is damaged."""
    path = folder / STAGES_FILE
    if not path.exists():
        return {}
    try:
        done = json.loads(path.read_bytes())
        if not isinstance(done, dict):
            raise ValueError(f"a {type(done).__name__}, not an object")
        if wrong := [name for name, figures in done.items() if not isinstance(figures, dict)]:
            raise ValueError(f"{wrong[0]} is no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: it can't be read ({error}); restore it, or choose another run_dir") from error
    return done


def write_done(folder: Path, done: Mapping[str, Any]) -> None:
    """Writes what `read_done` reads: the whole file, or nothing."""
    write_whole(folder / STAGES_FILE, json.dumps(done, indent=2) + "\n")


def remaining(wanted: Sequence[str], done: Collection[str]) -> str:
    """Sentences for the user of an interrupted run: which stages are done and which aren't."""
    ended, open_ = [name for name in wanted if name in done], [name for name in wanted if name not in done]
    return (
        f"Done: {', '.join(ended) or 'none of its stages'}; still to do: {', '.join(open_)}. A stage writes its model "
        "when it is done; what an interrupted one has learnt is in its checkpoint"
    )


def input_of(name: str, config: RunConfig) -> Path:
    """The file that the stage `name` learns from. If an earlier stage makes it and it isn't there, UserError names that
    stage's command."""
    source = STAGES[name].input
    assert source, name
    own = config.own_data(name)
    return own or require(config.folder / STAGES[source.made_by].folder / source.file, source.made_by)


def check_inputs(name: str, config: RunConfig) -> None:
    """Raises UserError if the input of the stage `name` is missing, or isn't what an earlier stage writes."""
    stage = STAGES[name]
    if stage.input:
        stage.input.check_file(input_of(name, config))
    start_of(name, config)


def start_of(name: str, config: RunConfig) -> str:
    """Where actors find the policy from which the stage `name` starts. Raises UserError if an earlier stage of this run
    makes it and isn't done."""
    before = STAGES[name].starts_from
    if before not in config.stages:
        return config.model
    return require_model(RunLocation.of(config), STAGES[before].folder, "policy", made_by=before)


def require(path: Path, made_by: str) -> Path:
    """Returns `path`, or raises UserError, which names the command that makes it."""
    if not path.exists():
        raise UserError(f"{path} isn't there; make it with `python -m autotraj {made_by}` on the same configuration")
    return path


def require_model(location: RunLocation, *names: str, made_by: str) -> str:
    """Where actors find a model of this run. Raises UserError, which names the command that makes it, if it is missing."""
    if not location.has_model(*names):
        require(location.path.joinpath(*names, "config.json"), made_by)
    return location.model(*names)


def num_steps(num_items: int, batch_size: int, epochs: int) -> int:
    return epochs * math.ceil(num_items / batch_size)


def batches(num_items: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """The indices of each step's items. Each epoch has all items once, in an order of its own."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_items).tolist()
        for start in range(0, num_items, batch_size):
            yield order[start : start + batch_size]


def learner_config(
    base: LearnerConfig, *, model: str, lr: float, steps: int, warmup_ratio: float, lora: LoraConfig | None, head: str
) -> LearnerConfig:
    """The learners' settings for a supervised stage: those of the run, with another objective."""
    changes = {
        "model": model,
        "lr": lr,
        "schedule": "cosine" if steps > 1 else "constant",
        "total_steps": steps if steps > 1 else None,
        "warmup_steps": min(round(warmup_ratio * steps), steps - 1),
        "num_minibatches": 1,
        "weight_sync": "host",
        # A score isn't sampled, so it has no temperature.
        **({"temperature": 1.0} if head == "scalar" else {}),
        "lora": lora,
        "head": head,
    }
    # `model_copy` would not validate the combination.
    return LearnerConfig.model_validate(base.model_dump() | changes)


def export(group: LearnerGroup, path: Path | Storage) -> None:
    """Writes the whole Hugging Face model, or leaves the old one. At a URI the old one is removed before the new is written.

    Raises RunError if the place can't be written; LearnerDied or LearnerTimeout if the learners are lost.
    """
    try:
        _export(group, path)
    except (LearnerDied, LearnerTimeout):
        raise
    except (OSError, StorageError, LearnerError) as error:
        raise RunError(
            f"the model {path} could not be written: {error}; mend that and go on from the last checkpoint"
        ) from error


def _export(group: LearnerGroup, path: Path | Storage) -> None:
    if isinstance(path, Storage):
        check_held(path.uri)
        group.export_hf(path)
        return
    with replacing(path) as partial:
        group.export_hf(partial.resolve())


def supervised(
    group: LearnerGroup,
    config: RunConfig,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    plan: Sequence[list[int]],
    step: Callable[[list[int]], Mapping[str, float]],
    *,
    interrupt: Interrupt,
    checkpoint_every: int,
    on_step: Callable[[int, Mapping[str, float]], bool],
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Starts `group` and takes the steps of `plan`, from `checkpoint` on if there is one, until the plan ends or `on_step`
    returns True; then calls `finish()`.

    Lost learners are replaced: new ones go on from the stage's newest checkpoint, or from the model and the first step.
    `on_step(number, metrics)` is called again for steps that are taken again. If a step was skipped, as its loss or gradient
    was not finite, its metrics only hold the reason (`learners.skipped_steps`).

    Raises:
        Interrupted: the user asked to stop; a checkpoint is written.
        RunError: the learners failed, or were lost too often; NotFinite: too many steps in a row were skipped, or all.
    """
    replacements = Replacements(config, folder)
    while True:
        try:
            group.recreate(checkpoint.learners if checkpoint else None)
            folder.note(group.notes)
            with interrupt.deferred():
                _take(
                    group,
                    folder,
                    plan,
                    checkpoint.step if checkpoint else 0,
                    step,
                    interrupt,
                    checkpoint_every,
                    on_step,
                )
                finish()
            return
        except LearnerError as error:
            checkpoint = replacements.checkpoint_after(error)
            folder.set_back(checkpoint)
            if interrupt.requested:
                raise Interrupted from error


def _take(
    group: LearnerGroup,
    folder: RunFolder,
    plan: Sequence[list[int]],
    done: int,
    step: Callable[[list[int]], Mapping[str, float]],
    interrupt: Interrupt,
    checkpoint_every: int,
    on_step: Callable[[int, Mapping[str, float]], bool],
) -> None:
    skips = Skips(len(plan))
    for number, indices in enumerate(plan[done:], start=done + 1):
        metrics = dict(step(indices))
        folder.write_metrics(number, metrics)
        skips.took(metrics)
        if on_step(number, metrics):
            return
        if interrupt.requested or number % checkpoint_every == 0:
            folder.checkpoint(number, lambda _, learners: group.save_to_path(learners), keep=1)
        if interrupt.requested:
            raise Interrupted
