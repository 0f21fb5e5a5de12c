"""A run's folder: the resolved configuration, metrics, trajectories and checkpoints, in one place.

config.toml          what ran, every default spelled out
metrics.jsonl        one line a step (`trackers`)
tensorboard/         the same for TensorBoard
trajectories.log     every scored group (`trajectory.log`)
notes.json           what the learners said of how the model is computed, if there is something
checkpoints/step-N   complete or absent: written beside and renamed; at a URI with a marker, see `location`
  …/log_sizes.json   how long the logs were then: what was written after it is undone when a run goes on from it
policy/              the trained model, Hugging Face format
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from autotraj.config.run import RunConfig, load, load_saved, to_toml, with_changes
from autotraj.errors import UserError
from autotraj.run_folder.changes import check_learners, damaged, refused
from autotraj.run_folder.location import CHECKPOINTS, RunLocation, write_error
from autotraj.run_folder.lock import clear
from autotraj.run_folder.trackers import TRACKERS
from learners.errors import LearnerDied, LearnerTimeout
from report.data import NOTES_FILE
from storage.objects import RETRY_S, Storage, StorageError, files_of
from storage.whole import partial_of, replacing, write_whole

logger = logging.getLogger(__name__)

LEARNERS = "learner_group"
"""The learner ranks' part of a checkpoint."""
SAME_COMMAND = "the same command"
LOG_SIZES = "log_sizes.json"
LOGS = ("trajectories.log", "online_repair/pairs.jsonl")
"""Append-only files of a run. When a run goes back to a checkpoint, they are cut to the length that they had then."""
CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    folder: Path  # on the driver: all of it, or without the learners' part
    learners: Path | Storage


class RunFolder:
    """Owns the files of one run, or of one of its stages. `go_on` is the command that resumes it."""

    def __init__(self, location: RunLocation, *, saved: Checkpoint | None = None, go_on: str = SAME_COMMAND) -> None:
        self.location = location
        self.path = location.path
        self.go_on = go_on
        self._last_step = saved.step if saved else None
        self._trackers = [make(self.path) for make in TRACKERS.values()]
        self._forget_after(saved)

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """A new run; refuses a folder that already holds checkpoints."""
        location = RunLocation.of(config)
        location.check()
        if location.storage:
            held = bool(_sealed(location.storage))
            clear(location.path)
        else:
            held = latest_checkpoint(location.path) is not None
        if held:
            raise UserError(
                f"run_dir: {location} already holds checkpoints; continue it with --resume {location.run_dir}, or choose "
                "another run_dir"
            )
        location.path.mkdir(parents=True, exist_ok=True)
        _shorten_logs(location.path, None)  # of a run that ended before its first checkpoint
        (location.path / "config.toml").write_text(to_toml(config), encoding="utf-8")
        location.push()
        return cls(location, go_on=_resume_command(location))

    @classmethod
    def resume(cls, run_dir: str, overrides: Sequence[str] = ()) -> tuple[RunFolder, RunConfig, Checkpoint]:
        """An earlier run, its configuration with `overrides`, and its newest checkpoint.

        What changes is written to the run's config.toml. Raises UserError, among others for a setting that the checkpoint
        depends on."""
        location = RunLocation(run_dir, retry_s=RETRY_S)
        location.check()
        location.pull()
        checkpoint = newest(location)
        if checkpoint is None or not (location.path / "config.toml").is_file():
            raise UserError(f"--resume {run_dir}: no run with a checkpoint there; start one with --config")
        saved = with_changes(load_saved(location.path / "config.toml"), {"run_dir": run_dir})
        config = load(location.path / "config.toml", [f"run_dir={json.dumps(run_dir)}", *overrides])
        if fixed := refused(saved, config, ["grpo"]):
            raise UserError(
                f"--resume {run_dir}: the checkpoint was made with {'; '.join(fixed[:4])}. These settings can't change "
                "within a run: leave them out, or start a new run"
            )
        check_learners(checkpoint.learners, config.learner)
        (location.path / "config.toml").write_text(to_toml(config), encoding="utf-8")
        _shorten_logs(location.path, checkpoint)
        location = RunLocation.of(config)
        return cls(location, saved=checkpoint, go_on=_resume_command(location)), config, checkpoint

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close()
            self.push()
            return
        try:
            self._close()
            self.location.push()  # so that the files that explain the error can be read elsewhere
        except (StorageError, OSError) as second:
            logger.warning(
                "%s: not everything is written (%s); what there is is in %s", self.location, second, self.path
            )

    @classmethod
    def stage(cls, config: RunConfig, name: str) -> tuple[RunFolder, Checkpoint | None]:
        """One stage's folder within a run, and its newest checkpoint if it was interrupted."""
        location = RunLocation.of(config, name)
        location.path.mkdir(parents=True, exist_ok=True)
        checkpoint = newest(location)
        _shorten_logs(location.path, checkpoint)
        return cls(location, saved=checkpoint), checkpoint

    @property
    def trajectory_log(self) -> str:
        return str((self.path / "trajectories.log").resolve())

    def set_back(self, checkpoint: Checkpoint | None) -> None:
        """Removes the metrics and logs of steps after the checkpoint (None: of all steps), which will be taken again."""
        self._forget_after(checkpoint)
        _shorten_logs(self.path, checkpoint)

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def _forget_after(self, checkpoint: Checkpoint | None) -> None:
        for tracker in self._trackers:
            tracker.forget_after(checkpoint.step if checkpoint else 0)

    def _close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def note(self, sentences: Sequence[str]) -> None:
        """Keeps notes on the training for the report, if there are any."""
        if sentences:
            self.write_json(NOTES_FILE, list(sentences))

    def write_json(self, name: str, content: Any) -> None:
        """Writes the file whole, or leaves it as it was."""
        write_whole(self.path / name, json.dumps(content, indent=2) + "\n")

    def push(self) -> None:
        """Uploads what has changed, if the run is kept at a URI. Raises RunError."""
        try:
            self.location.push()
        except (StorageError, OSError) as error:
            raise write_error(
                self.location, "the run's files could not be written", error, kept=self.kept, go_on=self.go_on
            ) from error

    def checkpoint(self, step: int, save: Callable[[Path, Path | Storage], Any], *, keep: int) -> None:
        """Has `save(folder, learners)` fill two places, completes the checkpoint and prunes all but the newest `keep`.

        Raises RunError, which says how to go on, or LearnerDied, LearnerTimeout; earlier checkpoints then stay as they
        were.
        """
        name = f"step-{step:06d}"
        target = self.path / CHECKPOINTS / name
        partial = partial_of(target)

        def save_all(folder: Path, learners: Path | Storage) -> None:
            save(folder, learners)
            (folder / LOG_SIZES).write_text(json.dumps(_log_sizes(self.path)))

        shutil.rmtree(partial, ignore_errors=True)
        failed = f"the checkpoint of step {step} could not be written"
        try:
            if step == self._last_step:  # the run was restored from it: a failure while writing it again would lose it
                _prune(self.location, keep)
                return
            if self.location.storage:
                partial.mkdir(parents=True)
                _upload_checkpoint(self.location, name, partial, save_all)
            else:
                with replacing(target):
                    partial.mkdir(parents=True)
                    save_all(partial.resolve(), partial.resolve() / LEARNERS)
            self._last_step, failed = step, "old checkpoints could not be removed"
            _prune(self.location, keep)
        except (LearnerDied, LearnerTimeout):  # the place can be written; the caller may replace the learners
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except (OSError, RuntimeError) as error:  # RuntimeError: StorageError, LearnerFailed, torch's for a full disk
            found = write_error(self.location, failed, error, kept=self.kept, go_on=self.go_on)
            shutil.rmtree(partial, ignore_errors=True)
            raise found from error

    @property
    def last_step(self) -> int | None:
        """The step of the newest complete checkpoint, which may be one of before a resume."""
        return self._last_step

    @property
    def kept(self) -> str:
        """The newest checkpoint, as a sentence for messages."""
        if self._last_step is None:
            return "There is no checkpoint yet"
        return f"The last complete checkpoint is of step {self._last_step}"

    @property
    def way_on(self) -> str:
        """The newest checkpoint and the command to go on from it, for messages."""
        if self._last_step is None:
            return f"{self.kept}; {SAME_COMMAND} starts again"
        return f"{self.kept}; go on with {self.go_on}"


def _resume_command(location: RunLocation) -> str:
    return f"python -m autotraj grpo --resume {location.run_dir}"


def _sealed(storage: Storage) -> list[str]:
    """The complete checkpoints, ordered as by `_in_order`."""
    try:
        return _in_order(storage.at(CHECKPOINTS).sealed())
    except StorageError as error:
        raise UserError(f"run_dir: {error}") from error


def _upload_checkpoint(
    location: RunLocation, name: str, partial: Path, save: Callable[[Path, Path | Storage], Any]
) -> None:
    assert location.storage
    location.push()  # the metrics and trajectories up to the checkpoint's step
    checkpoints = location.storage.at(CHECKPOINTS)
    checkpoints.unseal(name)  # left by an earlier attempt at this step
    save(partial.resolve(), checkpoints.at(name, LEARNERS))
    checkpoints.at(name).upload(partial, files_of(partial))
    checkpoints.seal(name)
    shutil.rmtree(partial)


def _prune(location: RunLocation, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what failed attempts have left."""
    for old in _complete(location.path)[:-keep]:
        shutil.rmtree(old)
    if location.storage:
        checkpoints = location.storage.at(CHECKPOINTS)
        whole = _in_order(checkpoints.sealed())
        for old_name in whole[:-keep]:
            checkpoints.unseal(old_name)
        for torn in set(_in_order(entry.partition("/")[0] for entry in checkpoints.entries() if "/" in entry)) - set(
            whole
        ):
            checkpoints.at(torn).clear()


def _shorten_logs(path: Path, checkpoint: Checkpoint | None) -> None:
    """Cuts the logs to their length at the checkpoint, or empties them. A checkpoint of an earlier version doesn't hold the
    lengths; then the logs stay as they are."""
    sizes: dict[str, int] = {}
    if checkpoint is not None:
        saved = checkpoint.folder / LOG_SIZES
        try:
            sizes = json.loads(saved.read_text()) if saved.is_file() else _log_sizes(path)
            sizes = {name: int(size) for name, size in sizes.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise damaged(saved, error) from error
    for name, size in _log_sizes(path).items():
        if size > sizes.get(name, 0):
            os.truncate(path / name, sizes.get(name, 0))


def _log_sizes(path: Path) -> dict[str, int]:
    return {name: (path / name).stat().st_size for name in LOGS if (path / name).is_file()}


def newest(location: RunLocation) -> Checkpoint | None:
    """The newest complete checkpoint of a run or stage. The driver's part of it is fetched to this machine."""
    if location.storage is None:
        folder = latest_checkpoint(location.path)
        return Checkpoint(_checkpoint_step(folder.name), folder, folder / LEARNERS) if folder else None
    names = _sealed(location.storage)
    if not names:
        return None
    checkpoints, folder = location.storage.at(CHECKPOINTS), location.path / CHECKPOINTS / names[-1]
    try:
        files = checkpoints.sealed_files(names[-1])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        checkpoints.at(names[-1]).download(folder, [name for name in files if not name.startswith(f"{LEARNERS}/")])
    except StorageError as error:
        raise UserError(f"run_dir: {error}") from error
    return Checkpoint(_checkpoint_step(names[-1]), folder, checkpoints.at(names[-1], LEARNERS))


def files_of_checkpoints(location: RunLocation, name: str) -> Iterator[bytes]:
    """The file `name` in the driver's part of each complete checkpoint of a run that has it. Raises StorageError."""
    if location.storage is None:
        for folder in _complete(location.path):
            if (folder / name).is_file():
                yield (folder / name).read_bytes()
        return
    checkpoints = location.storage.at(CHECKPOINTS)
    for folder_name in _in_order(checkpoints.sealed()):
        with suppress(FileNotFoundError):
            yield checkpoints.at(folder_name).read(name)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint below a local `run_dir`."""
    return next(reversed(_complete(run_dir)), None)


def _complete(run_dir: Path) -> list[Path]:
    """The complete checkpoints below a local `run_dir`, the oldest first."""
    folder = run_dir / CHECKPOINTS
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return [folder / name for name in _in_order(names)]


def _in_order(names: Iterable[str]) -> list[str]:
    """The names of checkpoints, in the order of their steps: as text, step-1000000 would come before step-999950."""
    return sorted((name for name in names if CHECKPOINT.fullmatch(name)), key=_checkpoint_step)


def _checkpoint_step(name: str) -> int:
    return int(name.removeprefix("step-"))
