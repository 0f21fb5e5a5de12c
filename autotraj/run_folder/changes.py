"""What may change when a run goes on: one list, for `run`, its single stages and `grpo --resume`.

A setting can't change if something in the folder was made with it: the folder would hold two runs. A stage has begun if it
is done or has a checkpoint. Deadlines, places, intervals between checkpoints and the numbers of steps to come may change.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from autotraj.config.run import RunConfig, differences
from autotraj.config.stage_registry import BASE_SHAPED_BY, STAGES
from autotraj.errors import UserError
from learners.checkpoint_format import META_FILE, check
from learners.config import LearnerConfig
from storage.objects import Storage, StorageError

SHAPES_NOTHING = (
    "sft.checkpoint_every ",
    "reward_model.when_unavailable ",
    "reward.math_timeout_s ",
    "reward.terms_timeout_s ",
    "episode.deadline_s ",
)
"""Settings of the sections that shape a stage, but that change nothing of what is made."""


def refused(saved: RunConfig, config: RunConfig, begun: Collection[str]) -> list[str]:
    """The changes that the stages that have begun don't allow, as `config.differences` writes them."""
    shaped = tuple(
        prefix for name in begun for prefix in (BASE_SHAPED_BY if name == "base" else STAGES[name].shaped_by)
    )
    return [
        change
        for change in differences(saved, config)
        if change.startswith(shaped) and not change.startswith(SHAPES_NOTHING)
    ]


def check_learners(learners: Path | Storage, config: LearnerConfig) -> None:
    """Raises UserError if learners of `config` can't go on from the checkpoint whose learners' part is at `learners`, or if
    its description can't be read. To be called before Ray and the engines are started."""
    meta = _meta(learners)
    try:
        check(meta, config, f"the checkpoint {learners}")
    except ValueError as error:
        raise UserError(f"learner.{error}") from error


def _meta(learners: Path | Storage) -> dict[str, Any]:
    try:
        data = learners.read(META_FILE) if isinstance(learners, Storage) else (learners / META_FILE).read_bytes()
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
    except StorageError as error:
        raise UserError(f"run_dir: {error}") from error
    except (OSError, ValueError) as error:
        raise damaged(
            learners.at(META_FILE) if isinstance(learners, Storage) else learners / META_FILE, error
        ) from error
    return found


def damaged(file: Path | Storage, error: Exception) -> UserError:
    """The error for a checkpoint's file that can't be read."""
    return UserError(
        f"{file} can't be read: {error or type(error).__name__}. This checkpoint is damaged: restore the file, or remove "
        "the checkpoint (and its marker step-N.json at a URI) to go on from the one before it"
    )
