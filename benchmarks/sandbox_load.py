"""Calls for load tests of the sandbox: what each is, and what its reply must look like."""

from __future__ import annotations

import random
from dataclasses import dataclass

from trajectory.types import ToolResult

SYMPY = "import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - {a} * x + {b}))\n"

HOSTILE_TIMEOUT_S = 0.3
"""Short, as one in three runs into it. On a busy machine a call may be stopped before it did what it tries: `timeout` is
always a right answer to a hostile one."""
HOSTILE: dict[str, tuple[str, tuple[str, ...]]] = {
    "never ends": ("while True: pass", ()),
    "deaf to its deadline": (
        "import signal\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        (),
    ),
    "output flood": ("while True: print('y' * 1000)", ("output_limit",)),
    "memory": ("x = bytearray(10**10)", ("memory",)),
    "memory of many": ("import os\nfor _ in range(9): os.fork()\nx = bytearray(10**8)", ("ok", "error", "memory")),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", ("error",)),
    "kills all it may": ("import os; os.kill(-1, 9)", ("ok", "error")),
    "crash": ("import ctypes; ctypes.string_at(0)", ("error",)),
    "orphan": ("import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\nprint('left')", ("ok",)),
    "zombies": ("import os\nfor _ in range(40):\n    if os.fork() == 0: os._exit(0)", ("ok", "error")),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", ("error",)),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        ("error", "memory"),
    ),
    "fills its disk": (
        "import os\nfor i in range(10**6): open(f'f{i}', 'wb').write(bytes(10**6))",
        ("error",),
    ),
    "fills the inodes": ("for i in range(10**6): open(f'/tmp/{i}', 'w').close()", ("error",)),
    "shared memory": ("for i in range(99): open(f'/dev/shm/{i}', 'wb').write(bytes(10**6))", ("ok", "error")),
    "leaves files": ("open('left', 'w').write('x'); open('/tmp/left', 'w').write('x')", ("ok", "error")),
    "leaves links": ("import os\nos.symlink('/', 'l'); os.symlink('/w/0', '/tmp/l'); os.mkfifo('f')", ("ok", "error")),
    "closed folders": ("import os\nos.makedirs('a/b'); os.chmod('a', 0)", ("ok",)),
    "poisons imports": ("open('json.py', 'w').write('1/0'); open('/tmp/json.py', 'w').write('1/0')", ("ok", "error")),
    "closes everything": ("import os; os.closerange(0, 4096)", ("ok",)),
    "sockets": ("import socket; socket.create_connection(('192.0.2.1', 80))", ("error",)),
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the mix. `output` is None if any will do."""

    name: str
    code: str
    statuses: tuple[str, ...]
    output: str | None
    timeout_s: float
    session_id: str | None = None
    hostile: bool = False

    def wrong(self, result: ToolResult) -> str:
        """The fault of its reply; empty if there is none."""
        if result.status == "unavailable":  # an explicit answer, counted by itself
            return ""
        if result.status not in self.statuses:
            return f"{self.name}: {result.status} ({result.message}) instead of {'/'.join(self.statuses)}"
        if self.output is not None and result.output != self.output:
            return f"{self.name}: printed {result.output[:80]!r} instead of {self.output[:80]!r}"
        return ""


def draw(rng: random.Random, number: int, hostile_share: float) -> Call:
    """The call of that number. Its output depends on the number, so another call's reply would be seen."""
    if rng.random() < hostile_share:
        name = rng.choice(sorted(HOSTILE))
        code, statuses = HOSTILE[name]
        return Call(name, code, (*statuses, "timeout"), None, HOSTILE_TIMEOUT_S, hostile=True)
    kind = rng.random()
    if kind < 0.7:
        return Call("print", f"print({number} * 2)", ("ok",), f"{number * 2}\n", 20.0)
    if kind < 0.8:
        a, b = rng.randrange(1, 50), rng.randrange(1, 50)
        low, high = sorted((a, b))
        code = SYMPY.format(a=a + b, b=a * b)
        return Call("sympy", code, ("ok",), f"[{low}, {high}]\n" if low != high else f"[{low}]\n", 20.0)
    if kind < 0.9:
        return Call("error", f"print({number}); 1 / 0", ("error",), None, 20.0)
    session = f"soak-{rng.randrange(1_000_000)}"
    return Call("session", f"x = {number}\nprint(x)", ("ok",), f"{number}\n", 20.0, session)
