"""The process behind `own_terms`: it imports the user's functions and calls them, one request after another.

A message is its length (uint32, little-endian) and msgpack. The first request is a list of import paths, and its answer the
sentence of refusal, or ''. Each further request names one of the paths, a group (`trajectory.log.encode_group`) and a
deadline; its answer has the key `values` or `failed`. User code may write to stdout and stderr, since neither is used here.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from trajectory.import_path import ImportPathError, resolve
from trajectory.log import decode_group
from trajectory.types import Group

NOTE_CHARS = 500
FOR_ONE, FOR_GROUP = ["task", "trajectory"], ["group"]
_LENGTH = struct.Struct("<I")


def send(connection: socket.socket, message: Any) -> None:
    """Send a message within the socket's timeout. Raises TimeoutError, or another OSError if the other end is gone."""
    body = msgpack.packb(message, unicode_errors="surrogatepass")
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket, deadline: float | None = None) -> Any:
    """The next message, waited for until `deadline` (`time.monotonic`). Raises TimeoutError, or EOFError or OSError if the
    other end is gone."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))
    return msgpack.unpackb(_exactly(connection, length, deadline), unicode_errors="surrogatepass")


def _exactly(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    data = b""
    while len(data) < size:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


class _NoNumber(Exception):
    """What the function returned can't be used. The message says what it was."""


@dataclass(frozen=True, slots=True)
class _Term:
    function: Callable[..., Any]
    takes_group: bool


def _load(path: str) -> _Term:
    """Raises ImportPathError for what isn't there, or isn't a function with the right parameters."""
    function = resolve(path)
    rule = "a reward term is a function of (task, trajectory), or of (group) for all trajectories of a task at once"
    if not callable(function) or inspect.isclass(function):
        raise ImportPathError(f"{path!r} is no function: {rule}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError) as error:
        raise ImportPathError(f"{path!r} doesn't tell its parameters: {rule}") from error
    needed = [p for p in parameters if p.default is p.empty]
    names = [p.name for p in needed]
    if names not in (FOR_ONE, FOR_GROUP) or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in needed):
        raise ImportPathError(f"{path!r} has the parameters ({', '.join(map(str, needed))}): {rule}")
    return _Term(function, takes_group=names == FOR_GROUP)


def _values(term: _Term, group: Group, runner: asyncio.Runner) -> list[tuple[float, str]]:
    if not term.takes_group:
        returned = [term.function(group.task, trajectory) for trajectory in group.trajectories]
        return [_number(value) for value in _awaited(returned, runner)]
    (values,) = _awaited([term.function(group)], runner)
    if not isinstance(values, list | tuple) or len(values) != len(group.trajectories):
        raise _NoNumber(f"returned {_shown(values)}, and not a list with a value for each of {len(group.trajectories)}")
    return [_number(value) for value in values]


def _awaited(returned: Sequence[Any], runner: asyncio.Runner) -> list[Any]:
    """The results, for which coroutines run at the same time. Raises the first exception of any."""
    if not any(map(inspect.isawaitable, returned)):
        return list(returned)

    async def gather() -> list[Any]:
        return await asyncio.gather(*returned, return_exceptions=True)

    found = runner.run(gather())
    for value in found:
        if isinstance(value, BaseException):
            raise value
    return found


def _number(returned: Any) -> tuple[float, str]:
    value, note = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, "")
    if not isinstance(value, numbers.Real | np.bool_) or not isinstance(note, str):
        raise _NoNumber(f"returned {_shown(returned)}, and not a number, or a number and a note")
    number = float(value)
    if not math.isfinite(number):
        raise _NoNumber(f"returned {number}")
    return number, note[:NOTE_CHARS]


def _shown(value: Any) -> str:
    return f"{repr(value)[:100]} ({type(value).__name__})"


def _answer(term: _Term, group: Group, runner: asyncio.Runner) -> dict[str, Any]:
    try:
        return {"values": _values(term, group, runner)}
    except _NoNumber as error:
        return {"failed": str(error)}
    except BaseException as error:  # a user's function may raise anything, SystemExit too
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        return {"failed": f"raised {type(error).__name__}: {str(error)[:NOTE_CHARS]} ({where})"}


def serve(fd: int) -> None:
    """Answers requests at a socket until its other end is closed."""
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)  # to the programs that user code may start
    try:
        terms = {path: _load(path) for path in receive(connection)}
    except ImportPathError as error:
        send(connection, str(error))
        return
    send(connection, "")
    with asyncio.Runner() as runner:  # one loop, as a user's client of a service may be bound to it
        while True:
            try:
                request = receive(connection)
            except EOFError:
                return
            # If the driver is gone, nobody kills this process at the deadline. This signal does.
            signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + 1)
            answer = _answer(terms[request["use"]], decode_group(request["group"]), runner)
            signal.setitimer(signal.ITIMER_REAL, 0)
            send(connection, answer)
