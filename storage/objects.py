"""Folders at a URI (`s3://bucket/runs/mine`), on any file system that pyarrow or fsspec knows, and their local copies.

An object is whole or absent, but there is no renaming of folders. So a folder that must be whole or absent, such as a
checkpoint, has a marker beside it: `step-000002.json` names the files of `step-000002/` with their sizes. It is written
last and removed first; without it the folder doesn't exist.

`fetch` is for folders that are only read, such as models: each node gets its copy.
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
"""How long a failing operation on one object is tried again, unless it is said."""
NUM_THREADS = 8
CHUNK_BYTES = 8 << 20
FETCH_TIMEOUT_S = 1800.0
"""Longest wait for another process of this node that fetches the same folder."""
STAMP = ".fetched.json"
"""In a fetched folder: what the original was when it was read."""
MISTAKES = (errno.ENOSPC, errno.EDQUOT)  # of the local disk: trying again won't help

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
    """The storage did not do as asked within its deadline. The message names the place, the cause and what was tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a listing says of an object; another upload of the same name has another time."""

    size: int  # bytes
    mtime_ns: int | None


@dataclass(frozen=True, slots=True)
class Storage:
    """One folder at a URI. Picklable; every operation opens the file system anew, so renewed credentials are taken up.

    All methods raise StorageError once an operation has failed for `retry_s` seconds.
    """

    uri: str
    retry_s: float = RETRY_S

    def __str__(self) -> str:
        return self.uri.partition("?")[0]

    def at(self, *names: str) -> Storage:
        return Storage(join(self.uri, *names), self.retry_s)

    def entries(self) -> dict[str, Entry]:
        """All files below, by their paths from here; empty if there is nothing."""

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
        """Raises FileNotFoundError."""

        def read(fs: Any, root: str) -> bytes:
            with fs.open_input_file(f"{root}/{name}") as file:
                data: bytes = file.read()
                return data

        return self._try(f"read {name}", read)

    def write(self, name: str, data: bytes) -> None:
        """The object whole, or as it was."""

        def write(fs: Any, root: str) -> None:
            _make_parent(fs, f"{root}/{name}")
            with fs.open_output_stream(f"{root}/{name}") as file:
                file.write(data)

        self._try(f"write {name}", write)

    def upload(self, folder: Path, names: Collection[str], *, last: Collection[str] = ()) -> None:
        """The named files of a local folder to the same names here; those of `last` when the others are there."""
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
        """The named files to the same names below a local folder. OSError if its disk is full."""
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
        """The named objects; one that isn't there is no error."""

        def remove(fs: Any, root: str) -> None:
            for name in names:
                try:
                    fs.delete_file(f"{root}/{name}")
                except FileNotFoundError:
                    continue

        self._try(f"remove {', '.join(names)}", remove)

    def clear(self) -> None:
        """Everything below."""

        def clear(fs: Any, root: str) -> None:
            fs.delete_dir_contents(root, missing_dir_ok=True)

        self._try("remove", clear)

    # --- folders that are whole or absent ---------------------------------------------------------------------------

    def sealed(self) -> list[str]:
        """The names of the whole folders below, sorted as text."""

        def list_markers(fs: Any, root: str) -> list[str]:
            from pyarrow.fs import FileSelector

            found = fs.get_file_info(FileSelector(root, allow_not_found=True))
            return sorted(info.base_name.removesuffix(".json") for info in found if info.base_name.endswith(".json"))

        return self._try("list", list_markers)

    def seal(self, name: str) -> None:
        """Declares the folder `name` to be whole as it is now."""
        files = {path: entry.size for path, entry in sorted(self.at(name).entries().items())}
        self.write(f"{name}.json", json.dumps({"id": uuid.uuid4().hex, "files": files}, indent=1).encode())

    def unseal(self, name: str) -> None:
        """Removes the folder `name`, its marker first."""
        self.remove(f"{name}.json")
        self.at(name).clear()

    def sealed_files(self, name: str) -> dict[str, int]:
        """Names and sizes of a whole folder's files. Raises StorageError if one is missing or of another size."""
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
        """Writes and removes an object, without a second try: for mistakes that are to be told before a run starts."""
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
            except OSError as error:  # what pyarrow raises for all that a server or a network can do
                if error.errno in MISTAKES:
                    raise
                if (tried := time.monotonic() - started) + pause > self.retry_s:
                    raise StorageError(f"{self}: {what}: {explain(error)} (tried for {tried:.0f} s)") from error
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def fetch(location: str, *, retry_s: float = RETRY_S) -> str:
    """A local path with what is at `location`: itself, or a copy that is made, or renewed, if it isn't there as it is now.

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
    """A folder on this node for the length of the block. Those that killed processes of this host left are removed."""
    host = f"scratch-{socket.gethostname()}-"
    cache().mkdir(parents=True, exist_ok=True)
    for old in cache().glob(f"{host}*"):
        if not Path(f"/proc/{old.name.removeprefix(host).partition('-')[0]}").exists():
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{host}{os.getpid()}-", dir=cache(), ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of this node at a time."""
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
    """An error of pyarrow's, with what it means in front if that is known."""
    text = " ".join(str(error).split())
    for pattern, meaning in CAUSES:
        if re.search(pattern, text):
            return f"{meaning}: {text}"
    return text


def _open(uri: str) -> tuple[Any, str]:
    """The file system and the path on it."""
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
    except (ValueError, ImportError) as error:  # a scheme that nobody knows, or whose package isn't installed
        raise StorageError(f"{uri.partition('?')[0]}: {error}") from error
    return PyFileSystem(FSSpecHandler(filesystem)), path


def _make_parent(fs: Any, path: str) -> None:
    """Object stores have no folders, and making one costs requests."""
    if fs.type_name not in ("s3", "gcs", "abfs"):
        fs.create_dir(path.rpartition("/")[0], recursive=True)


def _in_parallel(work: Callable[[str], None], names: Sequence[str]) -> None:
    """The first error ends it; what is under way is waited for, what isn't is left."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        futures = [threads.submit(work, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise


def files_of(folder: Path) -> list[str]:
    """All files below a local folder, by their paths from there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
