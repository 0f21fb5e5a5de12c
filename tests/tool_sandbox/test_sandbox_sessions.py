"""Stateful sessions: what is kept, what is lost, and that a loss is told."""

import time
import uuid
from collections.abc import Iterator

import pytest

from tool_sandbox.client import SandboxClient
from tool_sandbox.local import local_sandbox

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def small() -> Iterator[SandboxClient]:
    """One container, two slots, sessions that expire soon."""
    with local_sandbox(
        num_containers=1, num_spares=0, slots_per_container=2, session_idle_s=4.0, memory_mib=256
    ) as client:
        yield client


@pytest.fixture
def session_id() -> str:
    return uuid.uuid4().hex


def test_state_is_kept(client: SandboxClient, session_id: str) -> None:
    first = client.call("python", "x = 20\ndef f(): return x + 1\nprint('set')", session_id=session_id)
    assert (first.status, first.output, first.fresh) == ("ok", "set\n", True)
    second = client.call("python", "x += 1; print(f())", session_id=session_id)
    assert (second.status, second.output, second.fresh) == ("ok", "22\n", False)


def test_sessions_and_calls_share_nothing(client: SandboxClient, session_id: str) -> None:
    client.call("python", "secret = 1", session_id=session_id)
    for other in (None, session_id + "x"):
        assert "NameError" in client.call("python", "secret", session_id=other).output


def test_an_exception_keeps_the_state(client: SandboxClient, session_id: str) -> None:
    client.call("python", "x = 1", session_id=session_id)
    failed = client.call("python", "y = 2\n1 / 0", session_id=session_id)
    assert failed.status == "error"
    assert 'File "cell_2.py", line 2' in failed.output
    after = client.call("python", "print(x, y)", session_id=session_id)
    assert (after.output, after.fresh) == ("1 2\n", False)


def test_each_cell_is_a_file_while_it_runs(client: SandboxClient, session_id: str) -> None:
    client.call("python", "def f(): return 1\nfirst = __file__", session_id=session_id)
    code = "import inspect, os\nprint(open(__file__).read()[:6], os.path.exists(first), inspect.getsource(f), end='')"
    assert client.call("python", code, session_id=session_id).output == "import False def f(): return 1\n"


def test_a_full_scratch_costs_a_cell_only_its_file(client: SandboxClient, session_id: str) -> None:
    fill = "try:\n    file = open('big', 'wb')\n    while True: file.write(b'x' * 65536)\nexcept OSError: print('full')"
    assert client.call("python", fill, session_id=session_id, timeout_s=20).output == "full\n"
    assert client.call("python", "print(6 * 7)", session_id=session_id).output == "42\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("import os; os._exit(1)", "error"),
        ("while True: print('x' * 10**5)", "output_limit"),
    ],
)
def test_a_lost_session_is_fresh_again(client: SandboxClient, session_id: str, code: str, status: str) -> None:
    client.call("python", "x = 1", session_id=session_id)
    assert client.call("python", code, timeout_s=1.0, session_id=session_id).status == status
    after = client.call("python", "print('x' in globals())", session_id=session_id)
    assert (after.output, after.fresh) == ("False\n", True)


def test_a_session_that_dies_between_cells_is_never_shared(small: SandboxClient, session_id: str) -> None:
    """Its slot goes to others; its next cell must not run among them, nor claim that its state was there."""
    code = """
import ctypes, struct
x = 1
libc = ctypes.CDLL(None)
event = ctypes.create_string_buffer(struct.pack("Pii", 0, 9, 0), 64)  # SIGKILL: it ends a process that is stopped, too
timer = ctypes.c_void_p()
assert libc.timer_create(1, event, ctypes.byref(timer)) == 0
assert libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 200_000_000), None) == 0
"""
    assert small.call("python", code, session_id=session_id).status == "ok"
    time.sleep(0.6)
    # One other session: with two slots it evicts nobody.
    assert small.call("python", "mine = 1", session_id=f"{session_id}-other").status == "ok"
    after = small.call("python", "print('x' in globals(), 'mine' in globals())", session_id=session_id)
    assert (after.output, after.fresh) == ("False False\n", True)
    assert small.call("python", "print(mine)", session_id=f"{session_id}-other").output == "1\n"


def test_an_idle_session_makes_room(small: SandboxClient, session_id: str) -> None:
    """Two slots, three sessions: the one that was idle longest loses its state, and is told."""
    ids = [f"{session_id}-{n}" for n in range(3)]
    for name in ids:
        assert small.call("python", "x = 1", session_id=name).fresh
    assert not small.call("python", "x", session_id=ids[2]).fresh
    assert not small.call("python", "x", session_id=ids[1]).fresh
    assert small.call("python", "print(1)").status == "ok"  # a call needs a slot, too
    assert small.call("python", "0", session_id=ids[0]).fresh


def test_an_idle_session_expires(small: SandboxClient, session_id: str) -> None:
    small.call("python", "x = 1", session_id=session_id)
    assert not small.call("python", "x", session_id=session_id).fresh
    time.sleep(6.5)
    assert small.call("python", "0", session_id=session_id).fresh


def test_a_forged_end_of_cell_ends_the_session(client: SandboxClient, session_id: str) -> None:
    """It may lie about its own cell; what it says unasked costs it the session, and nobody else anything."""
    code = "import os\nfor fd in [*range(3, 64)] * 3:\n    try: os.write(fd, b'\\0')\n    except OSError: pass"
    client.call("python", code, session_id=session_id)
    until = time.monotonic() + 30
    # Stopped before it lied, it goes on to lie about the cells that follow.
    while not (after := client.call("python", "print(1)", session_id=session_id)).fresh:
        assert time.monotonic() < until, after
    assert (after.status, after.output) == ("ok", "1\n")


def test_a_cell_that_exits_leaves_the_next_its_input(client: SandboxClient, session_id: str) -> None:
    client.call("python", "exit()", session_id=session_id)
    after = client.call("python", "input()", session_id=session_id)
    assert not after.fresh
    assert "EOFError" in after.output
