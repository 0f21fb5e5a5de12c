"""Where a run is kept. A local `run_dir` is the run's folder itself. With a URI the run works in a folder on the driver's
disk, and the files at the URI are the run:

    start         URI ──▶ working folder     all but checkpoints and models, which are fetched when they are needed
    checkpoint    working folder ──▶ URI     what changed; then driver and learner ranks, each from its node, their parts of
                                             checkpoints/step-N/; then the marker checkpoints/step-N.json
    stage's end   working folder ──▶ URI     what changed, stages.json last

So another machine, with an empty working folder, can continue the run from the URI alone.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from autotraj.config.run import RunConfig
from autotraj.errors import RunError, UserError
from autotraj.run_folder.claim import CLAIMS, check_held
from autotraj.run_folder.lock import clear
from storage.locations import is_uri, join, local_path
from storage.objects import STAMP, Storage, StorageError, files_of

CHECKPOINTS = "checkpoints"
PUSH_EVERY_S = 300.0
LIVE = ("status.json",)
"""Files that are only of use while the process runs. They aren't uploaded."""
LAST = ("stages.json", "summary.json")
"""Files that say that other files are complete. They are uploaded last."""


class RunLocation:
    """The place of a run or of one of its stages: `run_dir`, a path or a URI, and `path`, the folder that is worked in.

    `storage` is None for a local run, which has nothing to pull or push."""

    def __init__(self, run_dir: str, *, retry_s: float, path: Path | None = None) -> None:
        """`path` is the working folder, if it isn't the run's own."""
        self.run_dir = run_dir
        self.path = path or local_path(run_dir)
        self.storage = Storage(run_dir, retry_s) if is_uri(run_dir) else None
        self._pushed: dict[str, tuple[int, int]] = {}
        self._pushed_at = time.monotonic()

    @classmethod
    def of(cls, config: RunConfig, *names: str) -> RunLocation:
        return cls(join(config.run_dir, *names), retry_s=config.storage_retry_s)

    def __str__(self) -> str:
        return str(self.storage or self.path)

    def place(self, *names: str) -> Path | Storage:
        """Where the learners' ranks, which may be on other nodes, write a file or folder of this run."""
        return self.storage.at(*names) if self.storage else self.path.joinpath(*names)

    def model(self, *names: str) -> str:
        """The path or URI under which actors on any node find a model of this run."""
        return join(self.run_dir, *names) if self.storage else str(self.path.joinpath(*names).resolve())

    def has_model(self, *names: str) -> bool:
        """Raises UserError if the storage can't be read."""
        if not self.storage:
            return self.path.joinpath(*names).exists()
        try:
            return "config.json" in self.storage.at(*names).entries()
        except StorageError as error:
            raise UserError(f"run_dir: {error}") from error

    def check(self) -> None:
        """Raises UserError if nothing can be written there. To be called before anything is started."""
        if self.storage:
            try:
                self.storage.check()
            except StorageError as error:
                raise UserError(f"run_dir: {error}") from error

    def pull(self) -> None:
        """Makes the working folder a copy of what is at the URI; anything else in it is removed. Raises UserError."""
        if not self.storage:
            return
        try:
            names = _without_models(self.storage.entries())
            clear(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self.storage.download(self.path, names)
        except StorageError as error:
            raise UserError(f"run_dir: {error}") from error
        self._pushed = self._files()

    def push(self, *, only_if_due: bool = False) -> None:
        """Uploads what has changed since the last time. With `only_if_due`, for stages without checkpoints, only if that was
        `PUSH_EVERY_S` ago. Raises StorageError."""
        if not self.storage or (only_if_due and time.monotonic() - self._pushed_at < PUSH_EVERY_S):
            return
        files = self._files()
        changed = [name for name, stat in files.items() if self._pushed.get(name) != stat]
        last = [name for name in changed if PurePosixPath(name).name in LAST]
        check_held(self.run_dir)
        self.storage.upload(self.path, changed, last=last)
        if gone := self._pushed.keys() - files.keys():
            self.storage.remove(*sorted(gone))
        self._pushed, self._pushed_at = files, time.monotonic()

    def _files(self) -> dict[str, tuple[int, int]]:
        """The files to be mirrored, with size and modification time (ns)."""
        found = {}
        for name in files_of(self.path):
            path = PurePosixPath(name)
            hidden = any(part.startswith(".") for part in path.parts)
            fetched = any((self.path / parent / STAMP).exists() for parent in path.parents)
            if not hidden and not fetched and CHECKPOINTS not in path.parts and path.name not in LIVE:
                stat = (self.path / name).stat()
                found[name] = (stat.st_size, stat.st_mtime_ns)
        return found


def _without_models(entries: Mapping[str, object]) -> list[str]:
    """The names of the files that a run reads in its own folder when it goes on."""
    models = {str(PurePosixPath(name).parent) for name in entries if name.endswith(".safetensors")}
    return [
        name
        for name in entries
        if not {CHECKPOINTS, CLAIMS} & set(PurePosixPath(name).parts) and str(PurePosixPath(name).parent) not in models
    ]


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def write_error(location: RunLocation, failed: str, error: BaseException, *, kept: str, go_on: str) -> RunError:
    """The error that ends a run whose files can't be written. It says where, what and why, what is kept and what to do."""
    place = Path(location.path if location.path.exists() else location.path.parent)
    free_mib = shutil.disk_usage(place).free >> 20
    full = disk_is_full(error) or free_mib == 0  # torch's error doesn't say so
    cause = f"the disk of {place} is full ({free_mib} MiB free): {error}" if full else str(error)
    remedy = "free some space" if full else "mend that"
    if location.storage:
        kept += f"; what isn't uploaded is in {location.path} until the run goes on"
    return RunError(f"run_dir {location}: {failed}: {cause}. {kept}. Then {remedy} and go on with {go_on}")
