"""What is done to a slot: interrupt what runs under its uid, or kill it all and remove what it left.

Most calls leave nothing: for them `is_clean` needs no process. The rest is done in forked children.
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
    """A slot's own directory: root's, writable for the slot's group, so that its owner can't open it to the neighbours."""
    return f"/w/{slot}"


def become(uid: int, effective: int | None = None) -> None:
    """Drop to `uid` for good: capabilities go with root, and the process is not dumpable, so not traceable either."""
    os.setgroups([])
    gid = uid if effective is None else effective
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, gid, uid)


def become_guard(slot: int, limits: dict[str, int]) -> None:
    """One that may signal a slot's processes, which can't signal back, as only a sender's effective uid counts.

    Each slot has a guard of its own: guards of the same uid would kill each other."""
    uid = limits["uid_base"] + slot
    become(uid + limits["num_slots"], effective=uid)


def interrupt(slot: int, limits: dict[str, int]) -> int:
    """SIGINT to all that runs under the slot's uid, as Ctrl-C does to all that runs in a terminal."""
    become_guard(slot, limits)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGINT)
    return 0


def signal_all(slot: int, limits: dict[str, int], number: signal.Signals) -> None:
    """A signal to all that runs under the slot's uid, from the zygote itself: see `is_clean`."""
    with acting_for(slot, limits), contextlib.suppress(ProcessLookupError):
        os.kill(-1, number)


@contextlib.contextmanager
def acting_for(slot: int, limits: dict[str, int]) -> Iterator[None]:
    """The zygote itself has the guard's uids meanwhile: it may do to the slot's processes what they may do to each other."""
    uid = limits["uid_base"] + slot
    os.setresuid(uid + limits["num_slots"], uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def is_clean(slot: int, limits: dict[str, int]) -> bool:
    """Kill all that runs under the slot's uid; True if nothing of it is left, and `clean` need not look.

    For the zygote itself, which has the guard's uids while it kills, and root's saved, so that nobody may signal it and it
    can come back. What a slot's owner may do to a process with his effective uid, the system call filter takes away."""
    uid = limits["uid_base"] + slot
    signal_all(slot, limits, signal.SIGKILL)
    with contextlib.suppress(OSError):  # every call leaves it; a directory of that name is for `clean`
        os.unlink(os.path.join(home_of(slot), SCRIPT))
    return not alive(uid) and not any(owned(directory, uid) for directory in directories_of(slot))


def clean(slot: int, limits: dict[str, int]) -> int:
    """Kill all that runs under the slot's uid and empty what it can write to. 0 when nothing is left."""
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
    """SIGKILL to all that this process's effective uid may kill; the kernel spares the caller, and forks can't outrun it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def directories_of(slot: int) -> tuple[bytes, ...]:
    """Where a slot's owner can write."""
    return (os.fsencode(home_of(slot)), *SHARED_DIRS)


def alive(uid: int) -> bool:
    """Whether a process other than this one runs under `uid`; one that waits to be reaped doesn't."""
    me = os.getpid()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == me:
            continue
        try:
            with open(f"/proc/{name}/status", "rb") as file:
                status = file.read()
        except OSError:
            continue  # ended meanwhile
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
        with contextlib.suppress(OSError, RecursionError):  # looked at again, and then with the tools
            os.unlink(path) if os.path.islink(path) or not os.path.isdir(path) else shutil.rmtree(path)


def remove_all(paths: list[bytes]) -> None:
    """Without Python's limits of depth, and directories that were closed by `chmod 000`."""
    for command in (["chmod", "-R", "u+rwx", "--"], ["rm", "-rf", "--"]):
        subprocess.run([*map(os.fsencode, command), *paths], stderr=subprocess.DEVNULL, timeout=CLEAN_TIMEOUT_S)


def close_all_but(keep: set[int]) -> None:
    low = 0
    for fd in [*sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]:
        if fd > low:  # CPython 3.11 closes everything when asked for an empty range
            os.closerange(low, fd)
        low = fd + 1
