"""Passes weights to the engines of a node, as one safetensors file that all of them read.

    share ──no file yet──▶ lock ──▶ reserve the space ──▶ write X.partial ──rename──▶ X.safetensors ──▶ a shared lock on it
       │                                                                                 ▲
       └── another process has the lock: wait, with a deadline ──────────────────────────┘

The first engine that asks writes the file, and the others wait for it. A file lasts as long as a process has a lock on it:
the last one that releases it removes it. The kernel releases the locks of a process that dies, so a file without a lock is
left over, and whoever writes next or starts removes it. A file gets its final name when it is complete, so nobody reads
half of one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from actors.engine.protocol import EngineError, EngineTimeout, NoRoom

logger = logging.getLogger(__name__)

Payload = Mapping[str, tuple[NDArray[np.generic], str]]
"""name → (array, dtype name); bfloat16 as its uint16 bits."""

SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.02
"""Time between two looks at a lock that another process has, seconds."""

SETTLING_S = 2.0
"""How long a lack of room is looked at again, seconds: a file that was removed keeps its space until all have closed it."""

COMPLETE, PARTIAL = ".safetensors", ".partial"

FORMAT_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's name of a dtype → that of the safetensors format."""


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """A complete file, which exists at least until this process calls `release` or ends."""

    path: Path
    _file: IO[bytes]

    def release(self) -> None:
        """Give the file up. It is removed if no other process reads it."""
        with self._file:
            _remove_if_unused(self.path, self._file)


def share(publication: str, payload: Payload, *, timeout_s: float) -> SharedWeights:
    """The file of one publication of weights, which this process writes if no other one of this node has. Blocks.

    It is in shared memory if that has room (a container's default is 64 MiB), otherwise in the folder for temporary files.

    Raises:
        NoRoom: neither has room. Nothing was written.
        EngineTimeout: another process has been writing it, or files of other versions have been in the way, for `timeout_s`.
    """
    started = time.monotonic()
    folders = _folders()
    while True:
        for folder in folders:
            if (held := _hold(folder / (publication + COMPLETE))) is not None:
                return held
        try:
            obstacle = _write(folders, publication, payload)
        except NoRoom:
            if time.monotonic() > started + min(timeout_s, SETTLING_S):
                raise
            obstacle = "there was no room"
        if obstacle is None:
            continue
        if time.monotonic() > started + timeout_s:
            raise EngineTimeout(f"the weights could not be taken within {timeout_s:g} s, because {obstacle}")
        time.sleep(POLL_S)


def remove_unused() -> None:
    """Remove what processes left behind that died."""
    for folder in _folders():
        _remove_unused_in(folder)


def read(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the file's (name, tensor), one after another."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            yield name, file.get_tensor(name)


# --- the file -------------------------------------------------------------------------------------------------------------


def _write(folders: Sequence[Path], publication: str, payload: Payload) -> str | None:
    """Write the file, into the first of `folders` with room. Returns why that must wait, or None when there is one."""
    # The widest types come first, so that each tensor is aligned to its type.
    names = sorted(payload, key=lambda name: -payload[name][0].itemsize)
    header = _header(names, payload)
    num_bytes = len(header) + sum(payload[name][0].nbytes for name in names)
    lacking: list[str] = []
    in_use: list[Path] = []
    for folder in folders:
        complete, partial = folder / (publication + COMPLETE), folder / (publication + PARTIAL)
        with partial.open("ab") as file:  # "a" creates it, and leaves it as it is if it is another process's
            if not _lock(file, fcntl.LOCK_EX) or not _is_at(file, partial):
                return f"another process has been writing {partial}"
            renamed = False
            try:
                if complete.exists():
                    return None
                file.truncate(0)  # the process that had begun it is dead
                in_use += _remove_unused_in(folder, but=partial)
                if not _reserve(file, num_bytes):
                    free = shutil.disk_usage(folder).free
                    lacking.append(f"{folder} has {_gib(free)} free")
                    continue
                _fill(partial, header, (payload[name][0] for name in names))
                partial.rename(complete)
                renamed = True
            finally:
                if not renamed:
                    partial.unlink()
        if lacking:
            logger.warning(
                "%s, and the weights need %s, so they go through %s; give the container more shared memory (--shm-size)",
                " and ".join(lacking), _gib(num_bytes), folder,
            )  # fmt: skip
        return None
    problem = f"the weights of one version need {_gib(num_bytes)} on this node, and {' and '.join(lacking)}"
    if in_use:  # of another version or of another run; it will be removed
        return f"{problem} beside {', '.join(map(str, in_use))}"
    raise NoRoom(f"{problem}: give the container more shared memory (--shm-size), or set TMPDIR to a larger disk")


def _header(names: Sequence[str], payload: Payload) -> bytes:
    """The beginning of a safetensors file: its length, then which tensor is where, padded to whole 8 bytes."""
    entries: dict[str, Any] = {}
    start = 0
    for name in names:
        array, dtype = payload[name]
        end = start + array.nbytes
        entries[name] = {"dtype": FORMAT_NAMES[dtype], "shape": array.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _reserve(file: IO[bytes], num_bytes: int) -> bool:
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def _fill(path: Path, header: bytes, arrays: Iterator[NDArray[np.generic]]) -> None:
    with path.open("r+b") as file:
        file.write(header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"


# --- locks ----------------------------------------------------------------------------------------------------------------


def _folders() -> list[Path]:
    """This user's folders for the files: in shared memory, if there is any, and in the folder for temporary files."""
    places = [SHARED_MEMORY] if SHARED_MEMORY.is_dir() else []
    folders = [place / f"autotraj-weights-{os.getuid()}" for place in [*places, Path(tempfile.gettempdir())]]
    for folder in folders:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise EngineError(f"{folder} is not a folder of this user (uid {os.getuid()}): remove it")
    return list(dict.fromkeys(folders))


def _hold(path: Path) -> SharedWeights | None:
    """The file at `path` with a lock that keeps others from removing it; None if there is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if _lock(file, fcntl.LOCK_SH) and _is_at(file, path):
        return SharedWeights(path, file)
    file.close()  # it is being removed
    return None


def _remove_unused_in(folder: Path, *, but: Path | None = None) -> list[Path]:
    """Remove all files, `but` one, on which no process has a lock. Returns those that remain."""
    in_use = []
    for path in folder.iterdir():
        if path == but or path.suffix not in (COMPLETE, PARTIAL):
            continue
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        with file:
            if not _remove_if_unused(path, file):
                in_use.append(path)
    return in_use


def _remove_if_unused(path: Path, file: IO[bytes]) -> bool:
    """Remove `path`, which is open as `file`, unless another process has a lock on it. Returns whether it is gone."""
    if not _lock(file, fcntl.LOCK_EX):
        return False
    if _is_at(file, path):
        path.unlink()
    return True


def _lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open `file` is still what `path` names: it may have been removed or renamed before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
