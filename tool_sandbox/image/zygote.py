"""A process that has imported what calls need, and forks one child for each. It never sees a request's code.

The supervisor (`runner.py`) talks to it over one SOCK_SEQPACKET socket; both orders carry descriptors or a slot only:

    {"op": "run", "slot": 0, "session": false} + [code, output(, control)]   fork, drop to the slot's uid, run the code
    {"op": "clean", "slot": 0}      fork, become the slot's uid, kill everything that has it, empty its directories
    → {"op": "run" | "clean", "slot": 0, "status": <as wait4 gives it>}

Root here has SETUID and SETGID only: it can't even signal a slot's processes except as that uid, and they can't touch it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import linecache
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types

EXIT_MEMORY = 77
"""Exit code, and a cell's reply, of code that ended with MemoryError. Code that fakes it only slanders itself."""

WARM_IMPORTS = (
    "numpy",
    "numpy.random",  # lazy otherwise, and then every call pays for it
    "scipy.linalg",
    "scipy.optimize",
    "scipy.special",
    "sympy",
)
SHARED_DIRS = (b"/tmp", b"/dev/shm")
CLEAN_TIMEOUT_S = 3.0
MAX_FRAMES = 8
PR_SET_CHILD_SUBREAPER = 36
end_process = os._exit  # code may put another in its place


def main() -> None:
    kind, limits = sys.argv[1], json.loads(sys.argv[2])
    orders = socket.socket(fileno=int(sys.argv[3]))
    # Orphans of a call become our children, so that they can be reaped and don't fill the container's process table.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if kind == "warm":
        for name in WARM_IMPORTS:
            importlib.import_module(name)
        warm_up()
    gc.collect()
    gc.freeze()  # what is here now is never collected, so forked children don't copy its pages
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_r, False)
    os.set_blocking(wake_w, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    orders.send(b'{"op": "ready"}')
    children: dict[int, tuple[str, int]] = {}
    sources: list[socket.socket | int] = [orders, wake_r]
    while True:
        readable, _, _ = select.select(sources, [], [])
        if wake_r in readable:
            os.read(wake_r, 4096)
            reap(orders, children)
        if orders in readable:
            data, fds, _, _ = socket.recv_fds(orders, 4096, 3)
            if not data:
                return  # the supervisor is gone, and with it the container
            fork(orders, json.loads(data), fds, limits, children)


def warm_up() -> None:
    """Run what people ask for first, so that lazy imports and caches are filled before the first fork."""
    sympy = importlib.import_module("sympy")
    x = sympy.Symbol("x")
    sympy.solve(x**2 - 3 * x + 2, x)
    sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)


def reap(orders: socket.socket, children: dict[int, tuple[str, int]]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in children:  # else an orphan of a call
            op, slot = children.pop(pid)
            orders.send(json.dumps({"op": op, "slot": slot, "status": status}).encode())


def fork(
    orders: socket.socket,
    order: dict[str, object],
    fds: list[int],
    limits: dict[str, int],
    children: dict[int, tuple[str, int]],
) -> None:
    op, slot = str(order["op"]), int(str(order["slot"]))
    try:
        pid = os.fork()
    except OSError as error:  # the container's process limit
        orders.send(json.dumps({"op": op, "slot": slot, "error": str(error)}).encode())
        pid = -1
    if pid == 0:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = clean(slot, limits) if op == "clean" else run(slot, bool(order["session"]), fds, limits)
        except BaseException:  # a defect of ours: the call's output, or the container's log, shall show it
            traceback.print_exc()
        finally:
            end_process(code)
    for fd in fds:
        os.close(fd)
    if pid > 0:
        children[pid] = (op, slot)


# -- in a forked child: cleaning ------------------------------------------------------------------------------------


def become(uid: int, effective: int | None = None) -> None:
    """Drop to `uid` for good: capabilities go with root, and the process is not dumpable, so not traceable either."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid if effective is None else effective, uid)


def clean(slot: int, limits: dict[str, int]) -> int:
    """Kill all that runs under the slot's uid and empty what it can write to. 0 when nothing is left."""
    close_all_but({0, 1, 2})
    uid = limits["uid_base"] + slot
    # A guard: it may kill `uid`, which can't kill back, as only the sender's effective uid counts.
    become(limits["uid_base"] + limits["num_slots"], effective=uid)
    deadline = time.monotonic() + CLEAN_TIMEOUT_S
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # the kernel spares the caller; forks can't outrun it
        if not alive(uid):
            break
        if time.monotonic() > deadline:
            return 1
        time.sleep(0.001)
    os.setresuid(uid, uid, uid)  # with no-new-privileges `rm` would lose an effective uid that isn't the real one
    home = os.fsencode(home_of(slot))
    os.chmod(home, 0o700)  # its owner may have opened it to the neighbours, or closed it to us
    left = [directory for directory in (home, *SHARED_DIRS) if not empty(directory, uid)]
    return len(left)


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
    with os.scandir(directory) as entries:
        return [entry.path for entry in entries if entry.stat(follow_symlinks=False).st_uid == uid]


def remove_fast(paths: list[bytes]) -> None:
    for path in paths:
        with contextlib.suppress(OSError, RecursionError):  # looked at again, and then with the tools
            os.unlink(path) if os.path.islink(path) or not os.path.isdir(path) else shutil.rmtree(path)


def remove_all(paths: list[bytes]) -> None:
    """Without Python's limits of depth, and directories that were closed by `chmod 000`."""
    for command in (["chmod", "-R", "u+rwx", "--"], ["rm", "-rf", "--"]):
        subprocess.run([*map(os.fsencode, command), *paths], stderr=subprocess.DEVNULL, timeout=CLEAN_TIMEOUT_S)


# -- in a forked child: a call --------------------------------------------------------------------------------------


def run(slot: int, session: bool, fds: list[int], limits: dict[str, int]) -> int:
    os.setsid()
    code_fd, output_fd = fds[0], fds[1]
    null_fd = os.open("/dev/null", os.O_RDWR)
    os.dup2(null_fd, 0)
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    control = socket.socket(fileno=fds[2]) if session else None
    close_all_but({0, 1, 2, code_fd, *fds[2:]})
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # before the supervisor, always
    limit(limits)
    become(limits["uid_base"] + slot)
    home = home_of(slot)
    os.umask(0o077)
    os.chdir(home)
    os.environ.update(HOME=home, TMPDIR=home, PWD=home, USER="sandbox", LOGNAME="sandbox")
    reseed()
    sys.argv = ["main.py"]
    sys.path[0] = home  # as for a script of one's own; it was this file's directory
    # A line at a time, so that what was printed is there when the call is killed at its deadline.
    # Opened anew, as those of the zygote believe that they write to a file.
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = stream(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = stream(2)  # type: ignore[misc]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if control is None:
        return leave(execute(take(code_fd), "main.py", module.__dict__))
    cell = 0
    while True:
        cell += 1
        try:
            status = execute(take(code_fd), f"cell_{cell}.py", module.__dict__)
        except SystemExit as end:
            return leave(exit_code(end))
        sys.stdout.flush()
        control.send(bytes([status]))
        _, cells, _, _ = socket.recv_fds(control, 1, 1)
        if not cells:
            return 0
        code_fd = cells[0]


def stream(fd: int) -> io.TextIOWrapper:
    return open(fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def close_all_but(keep: set[int]) -> None:
    low = 0
    for fd in [*sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]:
        if fd > low:  # CPython 3.11 closes everything when asked for an empty range
            os.closerange(low, fd)
        low = fd + 1


def limit(limits: dict[str, int]) -> None:
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    for name, value in (
        (resource.RLIMIT_AS, mapped + limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["scratch_bytes"]),
        (resource.RLIMIT_NPROC, limits["max_processes"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def reseed() -> None:
    """Siblings forked from one zygote would all draw the same numbers."""
    random.seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "sympy.core.random" in sys.modules:
        sys.modules["sympy.core.random"].seed(None)


def take(fd: int) -> str:
    """The code that waits in `fd`, a memory file, which is closed."""
    with open(fd, "rb") as file:
        file.seek(0)
        return file.read().decode("utf-8", errors="replace")


def execute(code: str, filename: str, namespace: dict[str, object]) -> int:
    """Run `code` as `python filename` would; 0, 1 or EXIT_MEMORY. SystemExit passes."""
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    try:
        exec(compile(code, filename, "exec", dont_inherit=True), namespace)
    except SystemExit:
        if filename == "main.py":
            return exit_code(sys.exc_info()[1])
        raise
    except MemoryError:
        print("MemoryError: the memory limit of a call was reached", file=sys.stderr)
        return EXIT_MEMORY
    except BaseException as error:
        sys.stdout.flush()
        show(error, filename)
        return 1
    return 0


def exit_code(end: BaseException | None) -> int:
    code = end.code if isinstance(end, SystemExit) else 1
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def show(error: BaseException, filename: str) -> None:
    """The traceback's last frames, from the first of the user's own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != filename:
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace, limit=-MAX_FRAMES)
    sys.stderr.write("".join(lines))


def leave(code: int) -> int:
    """What the interpreter does last: wait for threads, run exit handlers, flush."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def home_of(slot: int) -> str:
    return f"/w/{slot}"


if __name__ == "__main__":
    main()
