"""Cleans a slot: interrupts the processes of its uid, or kills them all and removes their files.

Most calls leave nothing. For these, `is_clean` needs no process of its own. The other functions run in forked children.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

SHARED_DIRS = (b"/tmp", b"/dev/shm")
CLEAN_TIMEOUT_S = 3.0
SCRIPT = "main.py"
"""A call's own code, in its directory."""


def home_of(slot: int) -> str:
    """Makes a slot's directory. Root owns it and the slot's group may write to it, so the slot can't open it to others."""
    return f"/w/{slot}"


def become(uid: int, effective: int | None = None) -> None:
    """Drop to `uid` for good. The process loses root's capabilities, and can't be dumped or traced."""
    os.setgroups([])
    gid = uid if effective is None else effective
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, gid, uid)


def become_guard(slot: int, limits: dict[str, int]) -> None:
    """Become a process that may signal a slot's processes. These can't signal it, as only a sender's effective uid counts.

    Each slot has a guard of its own: guards of the same uid would kill each other."""
    uid = limits["uid_base"] + slot
    become(uid + limits["num_slots"], effective=uid)


def interrupt(slot: int, limits: dict[str, int]) -> int:
    """Send SIGINT to all processes of the slot's uid, as Ctrl-C does in a terminal."""
    become_guard(slot, limits)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGINT)
    return 0


def signal_all(slot: int, limits: dict[str, int], number: signal.Signals) -> None:
    """Send a signal to all processes of the slot's uid, from the zygote itself: see `is_clean`."""
    with acting_for(slot, limits), contextlib.suppress(ProcessLookupError):
        os.kill(-1, number)


@contextlib.contextmanager
def acting_for(slot: int, limits: dict[str, int]) -> Iterator[None]:
    """Within the block the zygote has the guard's uids, and the same rights over the slot's processes as they have."""
    uid = limits["uid_base"] + slot
    os.setresuid(uid + limits["num_slots"], uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def is_clean(slot: int, limits: dict[str, int]) -> bool:
    """Kill all processes of the slot's uid; True if nothing is left, so that `clean` isn't needed.

    The zygote itself does this. It has the guard's uids while it kills, and root's as its saved uid, so that no process
    may signal it and it can return. The system call filter forbids what a slot may do to a process of its effective uid."""
    uid = limits["uid_base"] + slot
    signal_all(slot, limits, signal.SIGKILL)
    with contextlib.suppress(OSError):  # every call leaves it; a directory of that name is for `clean`
        os.unlink(os.path.join(home_of(slot), SCRIPT))
    return not alive(uid) and not any(owned(directory, uid) for directory in directories_of(slot))


def clean(slot: int, limits: dict[str, int]) -> int:
    """Kill all processes of the slot's uid and empty the directories that it can write to. 0 when nothing is left."""
    close_all_but({0, 1, 2})
    uid = limits["uid_base"] + slot
    become_guard(slot, limits)
    deadline = time.monotonic() + CLEAN_TIMEOUT_S
    while True:
        kill_all()
        if not alive(uid):
            break
        if time.monotonic() > deadline:
            return 1
        time.sleep(0.001)
    os.setresuid(uid, uid, uid)  # with no-new-privileges `rm` would lose an effective uid that isn't the real one
    return sum(not empty(directory, uid) for directory in directories_of(slot))


def kill_all() -> None:
    """Send SIGKILL to all processes that this one may kill. The kernel excludes the caller, and forks can't escape it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def directories_of(slot: int) -> tuple[bytes, ...]:
    """The directories that a slot's uid can write to."""
    return (os.fsencode(home_of(slot)), *SHARED_DIRS)


def alive(uid: int) -> bool:
    """Whether a process other than this one runs under `uid`. One that waits to be reaped doesn't count."""
    me = os.getpid()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == me:
            continue
        try:
            with open(f"/proc/{name}/status", "rb") as file:
                status = file.read()
        except OSError:
            continue  # it has ended
        if b"\nState:\tZ" in status or b"\nState:\tX" in status:
            continue
        owner = status.split(b"\nUid:\t", 1)[1].split(None, 1)[0]
        if int(owner) == uid:
            return True
    return False


def empty(directory: bytes, uid: int) -> bool:
    """Remove what `uid` owns in `directory`; True if nothing of it remains."""
    for remove in (remove_fast, remove_all):
        if not (mine := owned(directory, uid)):
            return True
        remove(mine)
    return not owned(directory, uid)


def owned(directory: bytes, uid: int) -> list[bytes]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # a neighbour's, who removes it just now
                if entry.stat(follow_symlinks=False).st_uid == uid:
                    found.append(entry.path)
    return found


def remove_fast(paths: list[bytes]) -> None:
    for path in paths:
        with contextlib.suppress(OSError, RecursionError):  # checked again, and then removed with `rm`
            os.unlink(path) if os.path.islink(path) or not os.path.isdir(path) else shutil.rmtree(path)


def remove_all(paths: list[bytes]) -> None:
    """Remove a tree that is too deep for Python, or that has directories closed by `chmod 000`."""
    for command in (["chmod", "-R", "u+rwx", "--"], ["rm", "-rf", "--"]):
        subprocess.run([*map(os.fsencode, command), *paths], stderr=subprocess.DEVNULL, timeout=CLEAN_TIMEOUT_S)


def close_all_but(keep: set[int]) -> None:
    low = 0
    for fd in [*sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]:
        if fd > low:  # CPython 3.11 closes everything when asked for an empty range
            os.closerange(low, fd)
        low = fd + 1
