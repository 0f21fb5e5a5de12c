"""Calls in real containers: every status, and what comes with it."""

import asyncio
import socket
import time

import pytest

from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.local import LocalGateway

pytestmark = pytest.mark.docker


def test_output_and_errors_of_the_code_come_back(roomy: SandboxClient) -> None:
    result = roomy.call("python", "import sys\nprint(2+2)\nprint('note', file=sys.stderr)")
    assert (result.status, result.output, result.message) == ("ok", "4\nnote\n", "")
    assert result.fresh
    result = roomy.call("python", "def f():\n    return 1 / 0\nprint('first')\nf()")
    assert result.status == "error"
    assert result.output.startswith("first\nTraceback")
    assert "return 1 / 0" in result.output
    assert "/opt/runner" not in result.output
    assert roomy.call("python", "print('é' * 3)\nprint(chr(0xd800))").output == "ééé\n\\ud800\n"


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("import sys; sys.exit(3)", "error", "exit code 3"),
        ("import sys; sys.exit()", "ok", ""),
        ("import os; os._exit(0)", "ok", ""),
        ("import os; os._exit(9)", "error", "exit code 9"),
        ("import os; os.closerange(0, 256)", "ok", ""),
        ("import os; os.kill(os.getpid(), 11)", "error", "signal 11"),
        ("import os; os.kill(os.getpid(), 40)", "error", "signal 40"),  # a real-time signal has no name
        ("import os; os.kill(os.getpid(), 9)", "error", "signal 9"),
        ("x = (", "error", "exit code 1"),
    ],
)
def test_how_a_process_ends_is_its_status(roomy: SandboxClient, code: str, status: str, message: str) -> None:
    result = roomy.call("python", code)
    assert result.status == status
    assert message in result.message


def test_preloaded_libraries_work_and_draw_other_numbers_each_time(roomy: SandboxClient) -> None:
    code = "import numpy, sympy, random\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - 5*x + 6))\n"
    code += "print(numpy.random.rand(), random.random())"
    first, second = roomy.call("python", code), roomy.call("python", code)
    assert first.output.startswith("[2, 3]\n")
    assert first.output != second.output


def test_the_deadline_is_kept_and_partial_output_with_it(roomy: SandboxClient) -> None:
    started = time.monotonic()
    result = roomy.call("python", "print('before')\nwhile True: pass", timeout_s=0.5)
    assert time.monotonic() - started < 10.0
    assert (result.status, result.output) == ("timeout", "before\nIt was at line 2: while True: pass\n")
    assert result.message == "The code was stopped: its time limit is 0.5 s."
    assert 0.4 <= result.duration_s < 10.0  # interrupted a fifth before its limit


@pytest.mark.parametrize(
    ("code", "place"),
    [
        ("def slow():\n    n = 0\n    while True: n += 1\nslow()", "It was at line 3, in slow: while True: n += 1\n"),
        ("import time\n\ntime.sleep(100)", "It was at line 3: time.sleep(100)\n"),
        (
            "import sympy\n" + "print(sympy.factorint(2**1277 - 1))",
            "It was at line 2: print(sympy.factorint(2**1277 - 1))\n",
        ),
        (
            "```python\nwhile True: pass\n```",
            "It was at line 2: while True: pass\n",
        ),  # as the code came, not as it is run
        ("x = [\n" + "9, " * 99 + "\n]\nwhile x: " + "x = list(x); " * 99, "It was at line 4: while x: x = list(x); "),
        ("import os, time\nos.fork()\ntime.sleep(100)", "It was at line 3: time.sleep(100)\n"),  # once
        ("import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass", ""),
        ("x = sum(range(10**12))", ""),  # C code that doesn't return: nobody can say where
    ],
)
def test_at_its_deadline_code_is_told_the_line_it_was_at(roomy: SandboxClient, code: str, place: str) -> None:
    result = roomy.call("python", code, timeout_s=2.0)
    assert result.status == "timeout"
    assert result.output.startswith(place)
    assert result.output.count("It was at") == bool(place)
    assert len(result.output) < 200
    assert result.message == "The code was stopped: its time limit is 2 s."


def test_a_line_of_an_earlier_cell_is_told_with_its_cell(roomy: SandboxClient) -> None:
    assert roomy.call("python", "def slow():\n    while True: pass", session_id="places").status == "ok"
    result = roomy.call("python", "slow()", session_id="places", timeout_s=1.0)
    assert (result.status, result.output) == ("timeout", "It was at line 2 of cell_1.py, in slow: while True: pass\n")


def test_a_deadline_that_beats_the_fork_is_kept_too(roomy: SandboxClient) -> None:
    """The process is killed by its uid, which it may not have taken yet."""
    for _ in range(8):
        assert roomy.call("python", "import time; time.sleep(5)", timeout_s=0.0005).status == "timeout"


def test_long_output_arrives_whole_and_too_long_output_ends_the_call(roomy: SandboxClient) -> None:
    assert roomy.call("python", "print('x' * 190_000)").output == "x" * 190_000 + "\n"
    result = roomy.call("python", "while True: print('y' * 1000)")
    assert result.status == "output_limit"
    assert len(result.output) == 300_000
    told = "it wrote more than its limit of 300000 bytes, and what it wrote beyond is cut off"
    assert result.message == f"The code was stopped: {told}."


@pytest.mark.parametrize("code", ["x = bytearray(10**10)", "x = []\nwhile True: x.append(bytearray(10**7))"])
def test_too_much_memory_is_told(roomy: SandboxClient, code: str) -> None:
    result = roomy.call("python", code, timeout_s=20)
    assert result.status == "memory"
    assert result.message == "The code was stopped: its memory limit is 256 MiB."


def test_what_is_refused_is_not_run(roomy: SandboxClient) -> None:
    result = roomy.call("search", "autotraj")
    assert result.status == "rejected"
    assert result.message == "no tool named 'search' here; there is python"
    result = roomy.call("python", "#" * 262_145)
    assert result.status == "rejected"
    assert "max_content_bytes" in result.message
    result = roomy.call("python", "1", timeout_s=61)
    assert result.status == "rejected"
    assert "sandbox.max_timeout_s=60" in result.message
    assert roomy.call("python", "print('\ud800')").status == "rejected"
    assert roomy.call("python", "#" * 3_000_000).status == "rejected"


async def test_the_async_client_runs_calls_side_by_side(roomy_gateway: LocalGateway) -> None:
    async with AsyncSandboxClient(roomy_gateway.address) as client:
        started = time.monotonic()
        results = await asyncio.gather(
            *(client.call("python", f"import time; time.sleep(1); print({i})") for i in range(4))
        )
        assert time.monotonic() - started < 3.9
    assert [result.output for result in results] == ["0\n", "1\n", "2\n", "3\n"]


async def test_cancelling_a_call_kills_its_code(strict_gateway: LocalGateway) -> None:
    async with AsyncSandboxClient(strict_gateway.address, token="open sesame") as client:
        call = asyncio.create_task(client.call("python", "import time; time.sleep(50)", timeout_s=55))
        await asyncio.sleep(0.7)
        assert not call.done()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        result = await client.call("python", "print('next')")  # in the only slot there is
        assert (result.status, result.output) == ("ok", "next\n"), result.message


async def test_without_a_gateway_calls_are_unavailable_and_nothing_is_raised() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with SandboxClient(address, queue_timeout_s=0.5) as client:
            started = time.monotonic()
            result = client.call("python", "1", timeout_s=0.5)
        async with AsyncSandboxClient(address, queue_timeout_s=0.5) as client:
            assert (await client.call("python", "1", timeout_s=0.5)).status == "unavailable"
        assert time.monotonic() - started < 12.0  # two deadlines of 0.5 + 0.5 + 5 s
    assert result.status == "unavailable"
    assert address in result.message


async def test_a_gateway_that_never_answers_is_waited_for_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tool_sandbox.client.MARGIN_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        async with AsyncSandboxClient(address, queue_timeout_s=0.3) as client:
            results = [await client.call("python", "1", timeout_s=0.5)]
        with SandboxClient(address, queue_timeout_s=0.3) as client:
            results.append(client.call("python", "1", timeout_s=0.5))
        assert time.monotonic() - started < 20.0
    for result in results:
        assert result.status == "unavailable"
        assert "waited 1.0 s on sandbox gateway" in result.message
