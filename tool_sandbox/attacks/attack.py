"""Attacks of hostile code in a container, as data: the code, and what must hold after it has run.

Code prints `BREACH` for everything that worked and must not, and `end` when it has tried everything. For every attack this
must hold: it printed no breach, ended with one of `statuses`, and read nothing of its neighbour's; the neighbour's calls got
right answers all the while; and the next calls found the slot and the container unchanged.
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
"""Names that the attacks' code may use."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack. `code` runs after `PREAMBLE`."""

    name: str
    tries: str  # what it tries, for people
    code: str
    statuses: tuple[str, ...] = ("ok",)
    timeout_s: float = 10.0
    session: bool = False  # whether it runs as a cell of a session
    beside: str = ""  # code that its neighbour runs at the start of each call, also after `PREAMBLE`
    crowds_out: bool = False  # whether the neighbour's call may be `unavailable`, and is then made again
    afterwards: str = ""  # for a session: code of another call after the cell has ended and before another came


KILLED = ("timeout", "error", "memory")
