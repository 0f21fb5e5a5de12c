"""Runs math-verify in a process of its own, because two short answers can keep it busy for ever or fill the memory.

A deadline inside the process isn't reliable: Python's signal handlers wait until a long integer operation ends, and they
need the main thread. So a process that misses its deadline is killed, and the next question starts another.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from trajectory.types import NoVerdict

MAX_CHARS = 1000
"""Longer answers aren't compared: no gold answer is nearly as long, and parsing time grows with length."""

START_TIMEOUT_S = 60.0  # it imports sympy, which takes about 2 s, and longer on a busy machine

_CHILD = Path(__file__).with_name("math_verify_child.py")


@dataclass(frozen=True, slots=True)
class Verdict:
    equal: bool
    no_verdict: NoVerdict | None = None  # why the answers couldn't be compared
    note: str = ""  # the same with the details, for people; empty if there is a verdict


class MathVerifier:
    """One child process, started when it is first needed. Threads use it one after another; each turn has a deadline."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def equal(self, answer: str, gold: str, timeout_s: float) -> Verdict:
        """Whether math-verify finds `answer` equal to `gold`. If it can't compare them, they count as different, with a
        note.

        Raises RuntimeError if the child can't be started, which means a broken installation and not a wrong answer.
        """
        if max(len(answer), len(gold)) > MAX_CHARS:
            return _no_verdict("too_long", f"an answer of more than {MAX_CHARS} characters isn't compared")
        request = json.dumps({"answer": answer, "gold": gold, "timeout_s": timeout_s}).encode() + b"\n"
        with self._lock:  # this needs no deadline: the thread that holds the lock has one
            child = self._running_child()
            try:
                os.write(_fd(child.stdin), request)  # at most 25 KB into an empty pipe, so it can't block
                reply = _read_line(child, timeout_s)
            except TimeoutError as error:
                self._stop()
                return _no_verdict("timeout", f"math-verify gave none: {error}")
            except OSError as error:
                self._stop()
                return _no_verdict("died", f"math-verify gave none: {error}")
        verdict = json.loads(reply)
        if "error" in verdict:
            return _no_verdict("failed", f"math-verify raised {verdict['error']}")
        return Verdict(verdict["equal"])

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._stop()
        # -P: this folder's config.py and format.py must not become top-level modules of the child.
        command = [sys.executable, "-P", str(_CHILD)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        try:
            _read_line(self._child, START_TIMEOUT_S)
        except (TimeoutError, OSError) as error:
            self._stop()
            raise RuntimeError(f"the math-verify process didn't start: {error} ({' '.join(command)})") from error
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()  # it was killed, so it ends at once
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            self._child = None


def _fd(pipe: IO[bytes] | None) -> int:
    assert pipe is not None  # both pipes were requested
    return pipe.fileno()


def _read_line(child: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """The child's next line. Raises TimeoutError, or OSError if the child ended."""
    deadline = time.monotonic() + timeout_s
    fd, line = _fd(child.stdout), b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"waited {timeout_s:g} s for it")
        chunk = os.read(fd, 65536)
        if not chunk:
            raise OSError("its process died")
        line += chunk
    return line


_verifier = MathVerifier()
atexit.register(_verifier.close)


def equal(answer: str, gold: str, timeout_s: float) -> Verdict:
    """`MathVerifier.equal` of the verifier that this process shares. Verdicts are remembered; answers without one aren't.

    A missing verdict may mean that the process was stopped or had no CPU, and not that the answer is at fault.
    """
    try:
        return _decided(answer, gold, timeout_s)
    except _NoVerdictError as error:
        return error.verdict


class _NoVerdictError(Exception):
    """Carries `verdict` past the cache, which stores what is returned and not what is raised."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.note)
        self.verdict = verdict


@lru_cache(maxsize=10_000)  # trajectories of the same group often give the same answer
def _decided(answer: str, gold: str, timeout_s: float) -> Verdict:
    verdict = _verifier.equal(answer, gold, timeout_s)
    if verdict.no_verdict:
        raise _NoVerdictError(verdict)
    return verdict


def _no_verdict(name: NoVerdict, what: str) -> Verdict:
    return Verdict(False, name, f"no_verdict/{name}: {what}")
