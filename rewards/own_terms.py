"""Calls the reward terms of the user's own in processes with a deadline, because a function may hang or end its process.

A process is started when a thread needs one and all others are busy. It is killed, with all that it started, when a term
misses its deadline. It imports the user's modules as this process would. They run with the user's rights.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from rewards.config import LARGEST, RewardConfig, TermConfig
from rewards.own_terms_child import receive, send
from trajectory.log import encode_group
from trajectory.types import Group

START_TIMEOUT_S = 120.0
"""The user's modules may import large packages."""

KILL_TIMEOUT_S = 10.0
"""A killed process may be held up by its disk or file system for longer; nobody waits for it then."""

_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from rewards.own_terms_child import serve; serve(int(sys.argv[2]))"
)


class TermRefused(ValueError):
    """A term that can't be used at all. The message names it and the remedy."""


class TermFailed(Exception):
    """A term gave no numbers for a group. The message names it and says why."""


class OwnTerms:
    """The user's own terms of one configuration. Several threads may use it, each with a process of its own meanwhile."""

    def __init__(self, config: RewardConfig) -> None:
        self.terms = config.terms
        self._timeout_s = config.terms_timeout_s
        self._lock = threading.Lock()
        self._all: set[_Process] = set()
        self._idle: list[_Process] = []
        self._closed = False

    def check(self) -> None:
        """Import all terms, in a process that is then ready. Raises TermRefused."""
        if self.terms:
            process = self._borrow()
            self._idle.append(process)

    def values(self, term: TermConfig, group: Group) -> list[tuple[float, str]]:
        """The number that `term` gives to each trajectory of `group`, and its note, '' if there is none. Raises
        TermFailed."""
        try:
            process = self._borrow()
        except TermRefused as error:
            raise TermFailed(str(error)) from error
        request = {"use": term.use, "group": encode_group(group), "timeout_s": self._timeout_s}
        try:
            answer = process.ask(request, self._timeout_s)
        except TimeoutError as error:
            self._discard(process)
            raise TermFailed(
                f"{term.use!r} did not return within reward.terms_timeout_s = {self._timeout_s:g} s"
            ) from error
        except (EOFError, OSError) as error:
            raise TermFailed(f"{term.use!r}: its process ended ({self._discard(process)})") from error
        self._idle.append(process)
        if "failed" in answer:
            raise TermFailed(f"{term.use!r} {answer['failed']}")
        values = [(float(value), str(note)) for value, note in answer["values"]]
        for value, _ in values:
            if abs(value * term.weight) > LARGEST:
                raise TermFailed(
                    f"{term.use!r} returned {value:g}; times its weight it may be at most {LARGEST:g} in size"
                )
        return values

    def close(self) -> None:
        """End all processes. A call that goes on in another thread raises TermFailed."""
        with self._lock:
            self._closed = True
            processes = list(self._all)
        for process in processes:
            self._discard(process)

    def _borrow(self) -> _Process:
        """An idle process, or a new one. Raises TermRefused."""
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        process = _Process()
        with self._lock:
            closed = self._closed
            self._all.add(process)
        if closed:
            self._discard(process)
            raise TermRefused("the run has ended")
        try:
            refusal = process.ask([term.use for term in self.terms], START_TIMEOUT_S)
        except TimeoutError as error:
            self._discard(process)
            raise TermRefused(f"importing the modules took more than {START_TIMEOUT_S:g} s") from error
        except (EOFError, OSError) as error:
            raise TermRefused(
                f"while the modules were imported, their process ended ({self._discard(process)})"
            ) from error
        if refusal:
            self._discard(process)
            raise TermRefused(refusal)
        return process

    def _discard(self, process: _Process) -> str:
        with self._lock:
            self._all.discard(process)
        return process.stop()


class _Process:
    """One child process, and the socket to it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _COMMAND, json.dumps(sys.path), str(theirs.fileno())]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what it prints must not mix with the driver's own output
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def ask(self, request: dict[str, Any] | Sequence[str], timeout_s: float) -> Any:
        """The child's answer. Raises TimeoutError, or EOFError or another OSError if the child has ended."""
        deadline = time.monotonic() + timeout_s
        self._socket.settimeout(timeout_s)
        send(self._socket, request)
        return receive(self._socket, deadline)

    def stop(self) -> str:
        """Kill the child with all that it started; returns how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(0.2)  # one that ends by itself has an exit code to tell
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._socket.close()
        try:
            return f"exit code {self._child.wait(KILL_TIMEOUT_S)}"
        except subprocess.TimeoutExpired:
            return f"it was killed, and is still there after {KILL_TIMEOUT_S:g} s"
