"""A process that has imported what calls need, and forks one child for each. It never sees a request's code.

The supervisor (`runner.py`) talks to it over one SOCK_SEQPACKET socket; all orders carry descriptors or a slot only:

    {"op": "run", "slot": 0, "session": false} + [code, output(, control)]   fork, drop to the slot's uid, run the code
    {"op": "stop", "slot": 0}       SIGSTOP to everything that has the slot's uid, between the cells of a session, and
    {"op": "continue", "slot": 0}   SIGCONT; neither is answered
    {"op": "look"}                  examine what every slot uses, and give each its share of the CPU (shares.py)
    {"op": "interrupt", "slot": 0}  fork, send SIGINT to everything that has the slot's uid
    {"op": "clean", "slot": 0}      kill everything that has the slot's uid; if that isn't all there is to do, fork, become
                                    the slot's uid, empty its directories
    → {"op": "run" | "interrupt" | "clean", "slot": 0, "status": <as wait4 gives it>}
    → {"op": "look", "slots": [[awake, switches, anon_bytes], …]}

Root here only has SETUID and SETGID. It can signal a slot's processes only under their uid, and they can't signal it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback

from tool_sandbox.image import advice, call, cleaning, syscalls
from tool_sandbox.image.shares import Shares

WARM_IMPORTS = (
    "numpy",
    "numpy.random",  # otherwise it is imported lazily, again in every call
    "pandas",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.special",
    "sympy",
)
PR_SET_CHILD_SUBREAPER = 36
end_process = os._exit  # code may replace it


def main() -> None:
    kind, limits = sys.argv[1], json.loads(sys.argv[2])
    orders = socket.socket(fileno=int(sys.argv[3]))
    # Orphans of a call become children of the zygote, which reaps them, so they don't fill the container's process table.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    missing = preload() if kind == "warm" else []
    syscalls.prepare()
    advice.name_no_network()
    gc.collect()
    gc.freeze()  # present objects are never collected, so forked children don't copy their pages
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_r, False)
    os.set_blocking(wake_w, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # also of children, until they run code
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    orders.send(json.dumps({"op": "ready", "missing": missing}).encode())
    children: dict[int, tuple[str, int]] = {}
    shares = Shares(limits)
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
            order = json.loads(data)
            if order["op"] == "look":
                cleaned = {slot for op, slot in children.values() if op != "run"}
                usages = [(usage.awake, usage.switches, usage.anon_bytes) for usage in shares.look(cleaned)]
                orders.send(json.dumps({"op": "look", "slots": usages}).encode())
            else:
                obey(orders, order, fds, limits, children)


def preload() -> list[str]:
    """Import the most used modules; returns the missing ones, as a user's own image need not have them."""
    missing = []
    for name in WARM_IMPORTS:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    warm_up()
    return missing


def warm_up() -> None:
    """Run the most used functions, so that lazy imports and caches are filled before the first fork."""
    if sympy := sys.modules.get("sympy"):
        x = sympy.Symbol("x")
        sympy.solve(x**2 - 3 * x + 2, x)
        sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)
    if pandas := sys.modules.get("pandas"):
        str(pandas.DataFrame({"x": [1.0]}).describe())


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


def obey(
    orders: socket.socket,
    order: dict[str, object],
    fds: list[int],
    limits: dict[str, int],
    children: dict[int, tuple[str, int]],
) -> None:
    op, slot = str(order["op"]), int(str(order["slot"]))
    if op == "clean" and cleaning.is_clean(slot, limits):
        orders.send(json.dumps({"op": op, "slot": slot, "status": 0}).encode())
        return
    if op in ("stop", "continue"):
        cleaning.signal_all(slot, limits, signal.SIGSTOP if op == "stop" else signal.SIGCONT)
        return
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
            if op == "run":
                code = call.run(slot, bool(order["session"]), fds, limits)
            else:
                code = {"clean": cleaning.clean, "interrupt": cleaning.interrupt}[op](slot, limits)
        except call.DeadlineInterrupt:
            pass  # it came when the code had just ended
        except BaseException:  # a defect of the runner: show it in the call's output, or in the container's log
            traceback.print_exc()
        finally:
            end_process(code)
    for fd in fds:
        os.close(fd)
    if pid > 0:
        children[pid] = (op, slot)


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):  # the supervisor, and with it the container, ended with an unread report
        main()
