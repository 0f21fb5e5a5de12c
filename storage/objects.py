"""Folders at a URI (`s3://bucket/runs/mine`), on any file system that pyarrow or fsspec supports, and their local copies.

An object is always complete or absent, but folders can't be renamed. So a folder that must be complete or absent, such as a
checkpoint, has a marker beside it: `step-000002.json` lists the files of `step-000002/` with their sizes. The marker is
written last and removed first. Without it the folder doesn't count as existing.

`fetch` is for folders that are only read, such as models: each node gets its own copy.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from storage.locations import cache, is_uri, join, local_path
from storage.whole import replacing

T = TypeVar("T")

RETRY_S = 120.0
"""How long a failing operation on one object is tried again, by default, seconds."""
NUM_THREADS = 8
CHUNK_BYTES = 8 << 20
FETCH_TIMEOUT_S = 1800.0
"""Longest wait for another process of this node that fetches the same folder, seconds."""
STAMP = ".fetched.json"
"""File in a fetched folder that describes the original at the time when it was read."""
MISTAKES = (errno.ENOSPC, errno.EDQUOT)  # errors of the local disk, for which another try is useless

CAUSES = (
    (r"ExpiredToken|RequestExpired|TokenRefreshRequired", "the credentials have expired"),
    (
        r"InvalidAccessKeyId|INVALID_ACCESS_KEY_ID|InvalidToken|SignatureDoesNotMatch|SIGNATURE",
        "the credentials are wrong",
    ),
    (r"AccessDenied|ACCESS_DENIED|HTTP status 403", "the credentials have expired or may not do this"),
    (r"NoSuchBucket|NO_SUCH_BUCKET|Bucket '[^']*' not found", "there is no such bucket"),
    (r"NETWORK_CONNECTION|Could ?n[o']t connect|Couldn't resolve|REQUEST_TIMEOUT", "the storage can't be reached"),
    (r"SlowDown|SLOW_DOWN|ServiceUnavailable|SERVICE_UNAVAILABLE", "the storage is overloaded"),
)


class StorageError(RuntimeError):
    """The storage failed until the deadline. The message names the place, the cause and what was tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A listing's data on an object. A second upload under the same name has another time."""

    size: int  # bytes
    mtime_ns: int | None


@dataclass(frozen=True, slots=True)
class Storage:
    """One folder at a URI. It can be pickled. Every operation opens the file system anew, to use renewed credentials.

    All methods raise StorageError once an operation has failed for `retry_s` seconds.
    """

    uri: str
    retry_s: float = RETRY_S

    def __str__(self) -> str:
        return self.uri.partition("?")[0]

    def at(self, *names: str) -> Storage:
        return Storage(join(self.uri, *names), self.retry_s)

    def entries(self) -> dict[str, Entry]:
        """All files below this folder, by their paths relative to it; empty if there are none."""

        def list_all(fs: Any, root: str) -> dict[str, Entry]:
            from pyarrow.fs import FileSelector, FileType

            found = fs.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
            return {
                os.path.relpath(info.path, root): Entry(size=info.size, mtime_ns=info.mtime_ns)
                for info in found
                if info.type == FileType.File
            }

        return self._try("list", list_all)

    def read(self, name: str) -> bytes:
        """The bytes of the object. Raises FileNotFoundError."""

        def read(fs: Any, root: str) -> bytes:
            with fs.open_input_file(f"{root}/{name}") as file:
                data: bytes = file.read()
                return data

        return self._try(f"read {name}", read)

    def write(self, name: str, data: bytes) -> None:
        """Write the object. If this fails, the object stays as it was."""

        def write(fs: Any, root: str) -> None:
            _make_parent(fs, f"{root}/{name}")
            with fs.open_output_stream(f"{root}/{name}") as file:
                file.write(data)

        self._try(f"write {name}", write)

    def upload(self, folder: Path, names: Collection[str], *, last: Collection[str] = ()) -> None:
        """Upload the named files of a local folder under the same names; those of `last` after all the others."""
        _in_parallel(lambda name: self._upload(folder, name), [name for name in names if name not in last])
        _in_parallel(lambda name: self._upload(folder, name), [name for name in names if name in last])

    def _upload(self, folder: Path, name: str) -> None:
        def copy(fs: Any, root: str) -> None:
            target = f"{root}/{name}"
            _make_parent(fs, target)
            with (folder / name).open("rb") as source, fs.open_output_stream(target) as file:
                sent = sum(file.write(chunk) for chunk in iter(lambda: source.read(CHUNK_BYTES), b""))
            if (there := fs.get_file_info(target).size) != sent:
                raise OSError(f"{there} of {sent} bytes arrived")

        self._try(f"upload {name}", copy)

    def download(self, folder: Path, names: Collection[str]) -> None:
        """Download the named files to the same names in a local folder. OSError if its disk is full."""
        _in_parallel(lambda name: self._download(folder, name), list(names))

    def _download(self, folder: Path, name: str) -> None:
        def copy(fs: Any, root: str) -> None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with (
                replacing(target) as partial,
                fs.open_input_stream(f"{root}/{name}") as source,
                partial.open("wb") as file,
            ):
                shutil.copyfileobj(source, file, CHUNK_BYTES)

        self._try(f"download {name}", copy)

    def remove(self, *names: str) -> None:
        """Remove the named objects. It is no error if one doesn't exist."""

        def remove(fs: Any, root: str) -> None:
            for name in names:
                try:
                    fs.delete_file(f"{root}/{name}")
                except FileNotFoundError:
                    continue

        self._try(f"remove {', '.join(names)}", remove)

    def clear(self) -> None:
        """Remove everything below this folder."""

        def clear(fs: Any, root: str) -> None:
            fs.delete_dir_contents(root, missing_dir_ok=True)

        self._try("remove", clear)

    # --- folders that are whole or absent ---------------------------------------------------------------------------

    def sealed(self) -> list[str]:
        """The names of the complete folders below this one, sorted as text."""

        def list_markers(fs: Any, root: str) -> list[str]:
            from pyarrow.fs import FileSelector

            found = fs.get_file_info(FileSelector(root, allow_not_found=True))
            return sorted(info.base_name.removesuffix(".json") for info in found if info.base_name.endswith(".json"))

        return self._try("list", list_markers)

    def seal(self, name: str) -> None:
        """Declare the folder `name`, as it is now, complete."""
        files = {path: entry.size for path, entry in sorted(self.at(name).entries().items())}
        self.write(f"{name}.json", json.dumps({"id": uuid.uuid4().hex, "files": files}, indent=1).encode())

    def unseal(self, name: str) -> None:
        """Remove the folder `name`, its marker first."""
        self.remove(f"{name}.json")
        self.at(name).clear()

    def sealed_files(self, name: str) -> dict[str, int]:
        """Names and sizes of a complete folder's files. Raises StorageError if one is missing or has another size."""
        try:
            files: dict[str, int] = json.loads(self.read(f"{name}.json"))["files"]
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise StorageError(f"{self}: {name} has no readable marker {name}.json: {error}") from error
        there = self.at(name).entries()
        if wrong := [path for path, size in files.items() if path not in there or there[path].size != size]:
            raise StorageError(
                f"{self}: {name} is damaged: {wrong[0]} is missing or of another size than {name}.json says; "
                f"without that object the one before {name} is taken"
            )
        return files

    # --- trying again -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Write and remove an object, with a single try, to find mistakes before a run starts."""
        once = Storage(self.uri, 0.0)
        name = f".check-{uuid.uuid4().hex}"
        once.write(name, b"autotraj")
        once.remove(name)

    def _try(self, what: str, work: Callable[[Any, str], T]) -> T:
        started, pause = time.monotonic(), 0.5
        while True:
            try:
                return work(*_open(self.uri))
            except FileNotFoundError:
                raise
            except OSError as error:  # pyarrow raises it for every error of a server or the network
                if error.errno in MISTAKES:
                    raise
                if (tried := time.monotonic() - started) + pause > self.retry_s:
                    raise StorageError(f"{self}: {what}: {explain(error)} (tried for {tried:.0f} s)") from error
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def fetch(location: str, *, retry_s: float = RETRY_S) -> str:
    """A local path with the files of `location`: itself if it is local, else a copy, which is made or renewed if needed.

    For models: any process of any node may ask, and the first one copies. Raises StorageError.
    """
    if not is_uri(location):
        return location
    storage, target = Storage(location, retry_s), local_path(location)
    entries = storage.entries()
    if not entries:
        raise StorageError(f"{storage}: there is nothing")
    stamp = json.dumps({name: [entry.size, entry.mtime_ns] for name, entry in sorted(entries.items())})
    with _locked(target):
        if (target / STAMP).is_file() and (target / STAMP).read_text() == stamp:
            return str(target)
        shutil.rmtree(target, ignore_errors=True)
        storage.download(target, entries)
        (target / STAMP).write_text(stamp)
    return str(target)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on this node for the duration of the block. It also removes those of killed processes of this host."""
    host = f"scratch-{socket.gethostname()}-"
    cache().mkdir(parents=True, exist_ok=True)
    for old in cache().glob(f"{host}*"):
        if not Path(f"/proc/{old.name.removeprefix(host).partition('-')[0]}").exists():
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{host}{os.getpid()}-", dir=cache(), ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process of this node in at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"{folder}: another process has been fetching it for {FETCH_TIMEOUT_S:.0f} s"
                    ) from None
                time.sleep(0.2)
        yield


def explain(error: BaseException) -> str:
    """The text of pyarrow's error, after its meaning if that is known."""
    text = " ".join(str(error).split())
    for pattern, meaning in CAUSES:
        if re.search(pattern, text):
            return f"{meaning}: {text}"
    return text


def _open(uri: str) -> tuple[Any, str]:
    """The file system of `uri`, and the path on it."""
    import pyarrow as pa
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        found: tuple[Any, str] = FileSystem.from_uri(uri)
        return found
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise StorageError(f"{uri.partition('?')[0]}: {error}") from error
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package isn't installed
        raise StorageError(f"{uri.partition('?')[0]}: {error}") from error
    return PyFileSystem(FSSpecHandler(filesystem)), path


def _make_parent(fs: Any, path: str) -> None:
    """Make the parent folder, except on object stores, which have no folders and where it would cost requests."""
    if fs.type_name not in ("s3", "gcs", "abfs"):
        fs.create_dir(path.rpartition("/")[0], recursive=True)


def _in_parallel(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Run `work` for all names. After a first error, running work is finished and the rest isn't started."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        futures = [threads.submit(work, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise


def files_of(folder: Path) -> list[str]:
    """All files in a local folder and below, by their paths relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
