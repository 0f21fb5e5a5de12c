"""math-verify in a process of its own, because two short answers can keep it busy for ever or fill the memory.

A deadline inside the process can't be relied on: Python's signal handlers wait until a long integer operation ends, and
they need the main thread. So a process that passes its deadline is killed, and the next question starts another.
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

MAX_CHARS = 1000
"""Longer answers aren't compared: no gold answer is near it, and parsing time grows with length."""

START_TIMEOUT_S = 60.0  # it imports sympy: about 2 s, longer on a busy machine

_CHILD = Path(__file__).with_name("math_verify_child.py")


@dataclass(frozen=True, slots=True)
class Verdict:
    equal: bool
    note: str = ""  # why the answers couldn't be compared


class MathVerifier:
    """One child process, started when it is first needed. Threads take turns, and each turn ends at its deadline."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def equal(self, answer: str, gold: str, timeout_s: float) -> Verdict:
        """Whether math-verify finds `answer` equal to `gold`; what it can't compare isn't equal, with a note.

        Raises RuntimeError if the child can't be started, which is a broken installation and not a wrong answer.
        """
        if max(len(answer), len(gold)) > MAX_CHARS:
            return Verdict(False, f"an answer of more than {MAX_CHARS} characters isn't compared")
        request = json.dumps({"answer": answer, "gold": gold, "timeout_s": timeout_s}).encode() + b"\n"
        with self._lock:  # no deadline of its own: whoever holds it has one
            child = self._running_child()
            try:
                os.write(_fd(child.stdin), request)  # at most 25 KB into an empty pipe: it can't block
                reply = _read_line(child, timeout_s)
            except (TimeoutError, OSError) as error:
                self._stop()
                return Verdict(False, f"math-verify gave no verdict: {error}")
        return Verdict(**json.loads(reply))

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
            self._child.wait()  # killed: it ends at once
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            self._child = None


def _fd(pipe: IO[bytes] | None) -> int:
    assert pipe is not None  # both were asked for
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


@lru_cache(maxsize=10_000)  # siblings give the same answers; a bomb costs its deadline once
def equal(answer: str, gold: str, timeout_s: float) -> Verdict:
    """`MathVerifier.equal` of the one verifier that this process shares."""
    return _verifier.equal(answer, gold, timeout_s)
