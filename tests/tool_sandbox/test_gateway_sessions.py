"""Sessions: state from cell to cell, and honesty about where it ended."""

import asyncio
import time

import pytest

from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.local import LocalGateway

pytestmark = pytest.mark.docker


def cell(client: SandboxClient, session_id: str, code: str, **settings: float) -> tuple[str, str, bool]:
    result = client.call("python", code, session_id=session_id, **settings)
    return result.status, result.output, result.fresh


def test_a_session_keeps_its_state_until_it_ends(roomy: SandboxClient) -> None:
    assert cell(roomy, "a", "x = 20\ndef f(): return x + 1") == ("ok", "", True)
    assert cell(roomy, "a", "print(f())") == ("ok", "21\n", False)
    status, output, fresh = cell(roomy, "a", "x += 1\n1 / 0")
    assert (status, fresh) == ("error", False)
    assert "cell_3.py" in output
    assert cell(roomy, "a", "print(x)") == ("ok", "21\n", False)
    assert cell(roomy, "a", "import sys; print('bye'); sys.exit()") == ("ok", "bye\n", False)
    assert cell(roomy, "a", "print('x' in globals())") == ("ok", "True\n", False)  # a cell ended, not the session
    assert cell(roomy, "a", "import os; os._exit(0)")[0] == "ok"
    assert cell(roomy, "a", "print('x' in globals())") == ("ok", "False\n", True)


def test_sessions_do_not_see_each_other(roomy: SandboxClient) -> None:
    cell(roomy, "b", "open('note', 'w').write('b'); who = 'b'")
    assert cell(roomy, "c", "import os; print(os.listdir(), 'who' in globals())") == (
        "ok",
        "['cell_1.py'] False\n",
        True,
    )
    assert cell(roomy, "b", "print(open('note').read(), who)") == ("ok", "b b\n", False)


def test_a_cell_over_its_deadline_ends_the_session_and_the_next_says_so(roomy: SandboxClient) -> None:
    cell(roomy, "d", "x = 1")
    status, output, fresh = cell(roomy, "d", "print('in')\nwhile True: pass", timeout_s=2.0)
    assert (status, output, fresh) == ("timeout", "in\nIt was at line 2: while True: pass\n", False)
    assert cell(roomy, "d", "print('x' in globals())") == ("ok", "False\n", True)


def test_a_session_whose_process_ends_between_cells_starts_anew(roomy: SandboxClient) -> None:
    """Its slot may be another call's by then: a cell must never run there."""
    code = """
import ctypes, struct
libc = ctypes.CDLL(None)
event = ctypes.create_string_buffer(struct.pack("Pii", 0, 9, 0), 64)  # SIGKILL: it ends a process that is stopped, too
timer = ctypes.c_void_p()
assert libc.timer_create(1, event, ctypes.byref(timer)) == 0
assert libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 200_000_000), None) == 0
"""
    assert cell(roomy, "e", code)[0] == "ok"
    time.sleep(0.6)
    assert cell(roomy, "e", "print('new')") == ("ok", "new\n", True)


def test_a_session_that_floods_its_output_between_cells_starves_nobody(roomy: SandboxClient) -> None:
    code = """
import threading
def flood():
    while True:
        print("z" * 10000)
threading.Thread(target=flood, daemon=True).start()
"""
    cell(roomy, "f", code)
    started = time.monotonic()
    for _ in range(4):
        assert roomy.call("python", "print(1)").output == "1\n"
    assert time.monotonic() - started < 30.0
    cell(roomy, "f", "import os; os._exit(0)")


def test_faking_the_end_of_a_cell_cheats_only_oneself(roomy: SandboxClient) -> None:
    code = """
import os, socket
for fd in range(3, 64):
    try:
        socket.socket(fileno=os.dup(fd)).send(b"")   # as if the process had closed it
        os.write(fd, b"\\0\\0")
    except OSError:
        pass
"""
    status, _, _ = cell(roomy, "g", code, timeout_s=1.0)
    assert status in ("ok", "timeout", "error")
    status, _, _ = cell(roomy, "g", "print('after')")
    assert status in ("ok", "error")
    assert cell(roomy, "h", "print('neighbour')") == ("ok", "neighbour\n", True)


def test_idle_sessions_make_room_for_calls_that_wait_and_the_oldest_first(roomy: SandboxClient) -> None:
    for name in ("i1", "i2", "i3", "i4"):  # as many as there are slots; those of other tests had to go
        assert cell(roomy, name, "x = 1")[0] == "ok"
    assert roomy.call("python", "print('room')").output == "room\n"
    assert cell(roomy, "i4", "print(x)") == ("ok", "1\n", False)
    assert cell(roomy, "i1", "print('x' in globals())") == ("ok", "False\n", True)


async def test_cells_of_one_session_run_in_the_order_they_came(roomy_gateway: LocalGateway) -> None:
    async with AsyncSandboxClient(roomy_gateway.address) as client:
        await client.call("python", "log = []", session_id="j")
        cells = []
        for i in range(4):
            cells.append(asyncio.create_task(client.call("python", f"log.append({i}); print(log)", session_id="j")))
            await asyncio.sleep(0.05)
        outputs = [(await task).output for task in cells]
    assert outputs == ["[0]\n", "[0, 1]\n", "[0, 1, 2]\n", "[0, 1, 2, 3]\n"]


async def test_a_cancelled_cell_ends_its_session_and_frees_its_slot(strict_gateway: LocalGateway) -> None:
    async with AsyncSandboxClient(strict_gateway.address, token="open sesame") as client:
        await client.call("python", "x = 1", session_id="k")
        task = asyncio.create_task(client.call("python", "import time; time.sleep(50)", timeout_s=55, session_id="k"))
        await asyncio.sleep(0.5)
        task.cancel()
        result = await client.call("python", "print('x' in globals())", session_id="k")
        assert (result.status, result.output, result.fresh) == ("ok", "False\n", True)
