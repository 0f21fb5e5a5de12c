"""Encodes groups as bytes, and keeps a log of them that stays readable after an interrupted write.

The log is a sequence of records. Each has a header of two little-endian uint32 (length of the payload, its CRC-32) and
the payload, which is one group in msgpack. If a writer dies within a record, the file ends with an incomplete record
(torn tail). Readers report it, and the next writer moves it away. Reading can't run code that is hidden in a file, as
unpickling would.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from trajectory.types import Group, Reward, Segment, Task, ToolCall, ToolResult, Trajectory, Turn

FORMAT = 1

_HEADER = struct.Struct("<II")
_DTYPE = re.compile(r"[<>|][biuf][1248]")
_log = logging.getLogger(__name__)


class RecordLog:
    """An append-only log of byte records, with one writer, and readers at any time."""

    def __init__(self, path: str | Path) -> None:
        """Open `path` for appending. The file is made if it doesn't exist.

        If it ends with a torn tail, that is moved into `path` + ".torn", so that later records can be read.
        """
        self._path = Path(path)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  # `close` closes it
        size = self._path.stat().st_size
        end = max((end for _, end in _records(self._path, size)), default=0)
        if end < size:
            with self._path.open("rb") as file:
                file.seek(end)
                Path(f"{path}.torn").write_bytes(file.read())
            self._file.truncate(end)

    def append_bytes(self, payload: bytes) -> None:
        """Write one record, in a single write. If OSError is raised, no part of it is in the file."""
        assert payload, "readers take an empty record for a torn one"
        record = _HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        start = os.fstat(self._file.fileno()).st_size
        if self._file.write(record) != len(record):
            self._file.truncate(start)  # an incomplete record in the middle would hide all later ones
            raise OSError(errno.ENOSPC, f"no room for {len(record)} bytes more", str(self._path))

    def close(self) -> None:
        self._file.close()


class TrajectoryLog(RecordLog):
    """An append-only log of groups."""

    def append(self, group: Group) -> None:
        """Write one group, in a single write. If OSError is raised, no part of it is in the file."""
        self.append_bytes(encode_group(group))


def read_log(path: str | Path) -> Iterator[Group]:
    """The groups of a log in order, up to a torn tail, for which a warning is logged.

    Raises ValueError for an intact record that isn't a group of this format.
    """
    return map(decode_group, read_records(path))


def read_records(path: str | Path) -> Iterator[bytes]:
    """The records of a log in order, up to a torn tail, for which a warning is logged."""
    size, end = Path(path).stat().st_size, 0
    for payload, record_end in _records(Path(path), size):
        yield payload
        end = record_end
    if end < size:
        _log.warning("%s: the last %d bytes, from byte %d on, are no complete record", path, size - end, end)


def _records(path: Path, size: int) -> Iterator[tuple[bytes, int]]:
    """The intact payloads in the first `size` bytes, up to the first that isn't intact, each with the offset after it."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, checksum = _HEADER.unpack(header)
            # After a crash of the whole machine the file may end in zeros, and the CRC-32 of an empty payload is 0.
            if not 0 < length <= size - file.tell():
                return
            payload = file.read(length)
            if zlib.crc32(payload) != checksum:
                return
            yield payload, file.tell()


def encode_group(group: Group) -> bytes:
    """A group as msgpack, with arrays as their bytes."""
    packed: bytes = msgpack.packb({"format": FORMAT, "group": group}, default=_plain, unicode_errors="surrogatepass")
    return packed


def decode_group(data: bytes) -> Group:
    """The group from which `encode_group` made `data`, equal in every field and array.

    Raises ValueError for anything else, such as the bytes of another version.
    """
    try:
        content = msgpack.unpackb(data, unicode_errors="surrogatepass")
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and this version reads {FORMAT}")
        group = content["group"]
        return Group(
            **group
            | {
                "task": Task(**group["task"] | {"golds": tuple(group["task"]["golds"])}),
                "trajectories": tuple(map(_trajectory, group["trajectories"])),
                "rewards": tuple(Reward(**reward | {"notes": tuple(reward["notes"])}) for reward in group["rewards"]),
            }
        )
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f"not a group of trajectories: {error}") from error


def _plain(value: Any) -> Any:
    """Convert a value that msgpack can't write by itself, one level at a time."""
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "shape": value.shape, "data": value.tobytes()}
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value):
        kind: Any = type(value)  # for mypy, which says that a class is not hashable
        return {name: getattr(value, name) for name in _field_names(kind)}
    raise TypeError(f"a group holds a {type(value).__name__}, which can't be stored")


@functools.cache
def _field_names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _trajectory(data: dict[str, Any]) -> Trajectory:
    arrays = {name: _array(data[name]) for name in ("prompt_ids", "response_ids", "loss_mask", "logprobs")}
    segments = tuple(Segment(**segment) for segment in data["segments"])
    return Trajectory(**data | arrays | {"segments": segments, "turns": tuple(map(_turn, data["turns"]))})


def _turn(data: dict[str, Any]) -> Turn:
    call, result = data["tool_call"], data["tool_result"]
    return Turn(
        **data
        | {
            "tool_call": None if call is None else ToolCall(**call),
            "tool_result": None if result is None else ToolResult(**result),
        }
    )


def _array(data: dict[str, Any]) -> NDArray[Any]:
    if not _DTYPE.fullmatch(data["dtype"]):
        raise ValueError(f"arrays of {data['dtype']!r} aren't read")
    return (
        np.frombuffer(data["data"], dtype=data["dtype"]).reshape(data["shape"]).copy()
    )  # a copy is writable, as before
