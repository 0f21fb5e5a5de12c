"""The reward models that online repair made, and how long they are kept.

    <run_dir>/online_repair/reward-model-000009      version 9; version 1 is the one that the run was configured with

A checkpoint names the version of the reward model that scored for it. So a model is kept as long as a complete checkpoint of
the run names it, or the service serves it. Only `prune` removes models, and only the loop's thread, which also writes the
checkpoints, calls it. So a checkpoint is never written while its model is being removed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

import msgpack

from autotraj.config.run import RunConfig
from autotraj.errors import UserError
from autotraj.loop.saved_loop import FIRST_VERSION, STATE_FILE, reward_model
from autotraj.run_folder.changes import damaged
from autotraj.run_folder.folder import Checkpoint, files_of_checkpoints
from autotraj.run_folder.location import CHECKPOINTS, RunLocation
from storage.locations import is_uri
from storage.objects import Storage

NAME = re.compile(r"reward-model-(\d+)")


class RefreshedModels:
    """The refreshed models of one run. Other threads may ask for a place; `prune` is only for the loop's thread."""

    def __init__(self, config: RunConfig) -> None:
        self._configured = config.reward_model.path
        self._run = RunLocation.of(config)
        self._location = RunLocation.of(config, "online_repair")

    def place(self, version: int) -> Path | Storage:
        """The place where learners write that version."""
        return self._location.place(_name(version))

    def location(self, version: int) -> str:
        """The location where actors on any node find that version."""
        return self._configured if version == FIRST_VERSION else self._location.model(_name(version))

    def find(self, version: int, saved_path: str = "") -> str:
        """`location`, or the path that a checkpoint names, which may be in another run's folder.

        Raises UserError if it is in neither place."""
        if version == FIRST_VERSION or self._location.has_model(_name(version)):
            return self.location(version)
        if saved_path and not is_uri(saved_path) and Path(saved_path, "config.json").is_file():
            return saved_path
        raise UserError(
            f"the newest checkpoint of {self._run} was scored by version {version} of the reward model, and "
            f"{self._location}/{_name(version)} isn't there: put it back, or remove that checkpoint from "
            f"{self._run}/checkpoints to go on from the one before it"
        )

    def is_counted(self, checkpoint: Path) -> bool:
        """Whether a checkpoint at this place belongs to the run, which then keeps its model."""
        return checkpoint.resolve().is_relative_to((self._run.path / CHECKPOINTS).resolve())

    def prune(self, *, serving: int, pinned: Collection[int] = ()) -> None:
        """Remove models that no complete checkpoint names, that the service doesn't serve and that aren't in `pinned`.

        Raises OSError or StorageError. What wasn't removed is tried again the next time."""
        named = {reward_model(data)[0] for data in files_of_checkpoints(self._run, STATE_FILE)}
        keep = {serving, *pinned, *named}
        for old in sorted(self._location.path.glob("reward-model-*")):
            if (version := _version(old.name)) is not None and version not in keep:
                shutil.rmtree(old)
        if self._location.storage:
            names = {name.partition("/")[0] for name in self._location.storage.entries() if "/" in name}
            for name in sorted(names):
                if (version := _version(name)) is not None and version not in keep:
                    self._location.storage.at(name).clear()


def require_reward_model(config: RunConfig, checkpoint: Checkpoint) -> None:
    """UserError if the reward model that scored for a checkpoint is gone, or if the checkpoint's state, which names it,
    can't be read. This is checked before anything is started."""
    state = checkpoint.folder / STATE_FILE
    try:
        version, path = reward_model(state.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise damaged(state, error) from error
    if config.reward_model.path:
        RefreshedModels(config).find(version, path)


def _name(version: int) -> str:
    return f"reward-model-{version:06d}"


def _version(name: str) -> int | None:
    match = NAME.fullmatch(name)
    return int(match[1]) if match else None
