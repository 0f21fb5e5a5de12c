"""What hostile code tries in a container, as data: the code, and what must hold when it has run.

Code says `BREACH` for whatever worked that must not, and `end` when it has tried everything. Of every attack it must hold
that it said no breach, ended with one of `statuses`, read nothing of its neighbour's, that the neighbour's calls were
answered rightly all the while, and that the next calls found the slot, and the container, as if nothing had been.
"""

from __future__ import annotations

from dataclasses import dataclass

BREACH, END = "BREACH", "end"

PREAMBLE = """
import ctypes, errno, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, action):
    try:
        result = action()
    except Exception:
        return
    print("BREACH", what, repr(result)[:100])
def others():
    return [int(p) for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()]
def spawn(action, times=1):
    for _ in range(times):
        if os.fork() == 0:
            try:
                action()
            finally:
                os._exit(0)
"""
"""What the attacks' code has at hand."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One attempt. `code` runs after `PREAMBLE`."""

    name: str
    tries: str  # in words, for people
    code: str
    statuses: tuple[str, ...] = ("ok",)
    timeout_s: float = 10.0
    session: bool = False  # a cell of a session
    beside: str = ""  # what its neighbour does at the start of each call; also after `PREAMBLE`
    crowds_out: bool = False  # the neighbour's call may be `unavailable`, and is made again
    afterwards: str = ""  # of a session: what another call does when the cell has ended and no other came


KILLED = ("timeout", "error", "memory")
