"""A real gateway that was itself stopped for longer than its deadlines: it kills nobody for the time that it slept."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tool_sandbox import client as client_module
from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.container import STOP_TIMEOUT_S
from tool_sandbox.local import ROOT, LocalGateway

pytestmark = pytest.mark.docker

CONFIG = SandboxConfig(
    num_containers=2, num_spares=1, slots_per_container=2, memory_mib=128, scratch_mib=16, session_idle_s=8.0
)
LIMIT_S = 3.0
STOPPED_S = LIMIT_S + STOP_TIMEOUT_S + 3.0
"""Beyond what the gateway gives a call of `LIMIT_S`, and beyond a session's idle time."""


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_calls_in_flight_are_answered_and_no_container_dies(
    containers_of: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_OPTIONS", [])  # one that asks for no sign of life, and so doesn't hang up
    with LocalGateway(CONFIG) as gateway:
        async with AsyncSandboxClient(gateway.address) as client, asyncio.timeout(120):
            await all_up(client, 3, lambda: containers_of(gateway.pid))
            before = containers_of(gateway.pid)
            assert (await client.call("python", "x = 41", session_id="s", timeout_s=20)).status == "ok"

            calls = [
                asyncio.create_task(client.call("python", code, timeout_s=LIMIT_S, session_id=session_id))
                for code, session_id in (
                    ("import time; print('begun'); time.sleep(1); print('done')", None),
                    ("print('endless')\nwhile True: pass", None),
                    ("x += 1; import time; time.sleep(1); print(x)", "s"),
                )
            ]
            await asyncio.sleep(0.5)  # they run now, as the answers show
            with stopped(gateway.pid):
                await asyncio.sleep(STOPPED_S)
            done, endless, cell = await asyncio.gather(*calls)
            assert (done.status, done.output) == ("ok", "begun\ndone\n"), done.message
            assert endless.status == "timeout", endless.message
            assert endless.output.startswith("endless\n")
            assert (cell.status, cell.output, cell.fresh) == ("ok", "42\n", False), cell.message

            later = await client.call("python", "print(x)", session_id="s", timeout_s=20)
            assert (later.output, later.fresh) == ("42\n", False), later
            assert containers_of(gateway.pid) == before


async def test_a_session_is_not_idle_while_its_gateway_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_OPTIONS", [])
    config = CONFIG.model_copy(update={"num_spares": 0, "num_containers": 1, "session_idle_s": 4.0})
    with LocalGateway(config) as gateway:
        async with AsyncSandboxClient(gateway.address) as client, asyncio.timeout(120):
            assert (await client.call("python", "x = 1", session_id="s", timeout_s=20)).status == "ok"
            with stopped(gateway.pid):
                asked = asyncio.create_task(client.call("python", "print(x)", session_id="s", timeout_s=20))
                await asyncio.sleep(8)
            result = await asked
            assert (result.output, result.fresh) == ("1\n", False), result
            while await num_sessions(gateway):  # nobody uses it any more: an idle session still ends
                pass


def test_a_gateway_that_is_stopped_while_it_starts_comes_up(containers_of: Callable[[int], list[str]]) -> None:
    config = CONFIG.model_copy(update={"num_containers": 1, "num_spares": 0, "start_timeout_s": 5.0})
    process = subprocess.Popen(
        [sys.executable, "-m", "tool_sandbox.server", str(os.getpid())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(config.model_dump_json().encode())
        process.stdin.close()
        until = time.monotonic() + 60
        while not is_launching(process.pid):
            assert time.monotonic() < until
        with stopped(process.pid):  # its container comes up meanwhile
            time.sleep(config.start_timeout_s + 2)
            before = containers_of(process.pid)
        message = json.loads(process.stdout.readline())
        assert "address" in message, message
        assert containers_of(process.pid) == before
        with SandboxClient(message["address"]) as client:
            assert client.call("python", "print(1)", timeout_s=20).output == "1\n"
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


async def test_a_container_that_is_silent_still_dies_of_it(containers_of: Callable[[int], list[str]]) -> None:
    config = CONFIG.model_copy(update={"num_containers": 1, "num_spares": 0})
    with LocalGateway(config) as gateway:
        async with AsyncSandboxClient(gateway.address) as client, asyncio.timeout(120):
            (before,) = containers_of(gateway.pid)
            docker("pause", before)
            result = await client.call("python", "print(1)", timeout_s=1.0)
            assert result.status == "unavailable"
            assert "did not answer a call" in result.message
            docker("kill", before)
            assert (await client.call("python", "print(2)", timeout_s=20)).output == "2\n"
            assert containers_of(gateway.pid) != [before]


def docker(*command: str) -> None:
    subprocess.run(["docker", *command], check=True, capture_output=True, timeout=30)


def is_launching(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # one ended while we looked
        return any(child.cmdline()[:2] == ["docker", "run"] for child in psutil.Process(pid).children(recursive=True))
    return False


async def all_up(client: AsyncSandboxClient, number: int, names: Callable[[], list[str]]) -> None:
    async with asyncio.timeout(60):
        while len(names()) < number:
            assert (await client.call("python", "1", timeout_s=20)).status == "ok"


async def num_sessions(gateway: LocalGateway) -> int:
    with SandboxClient(gateway.address) as client:
        return (await asyncio.to_thread(client.stats, 20)).pool.sessions
