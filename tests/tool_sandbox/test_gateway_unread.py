"""A client that sends calls and reads no answers costs the gateway a bounded number of bytes, and nobody else a call."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import psutil
import pytest
from own_gateways import StandIn, StartGateway, gateway_process

from tool_sandbox import unread
from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig
from trajectory.types import ToolResult

pytestmark = pytest.mark.slow

ANSWER_BYTES = 1_000_000
NUM_CALLS = 120
MANY_CALLS = 2000
"""So many that what they leave lies scattered among what stays."""


class BigTool(StandIn):
    """Every call answers a megabyte."""

    async def run(self, content: str, **_: Any) -> ToolResult:
        return ToolResult(status="ok", output="x" * ANSWER_BYTES)


class Valve:
    """A way to the gateway on which answers pass only while `open` is set."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.open = asyncio.Event()
        self.address = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", self._port)
        for coroutine in (self._pass(reader, forth, None), self._pass(back, writer, self.open)):
            task = asyncio.create_task(coroutine)
            self._tasks.add(task)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event | None
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if gate is not None:
                    await gate.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def num_answered(client: SandboxClient) -> int:
    stats = await asyncio.to_thread(client.stats, 20)
    return sum(stats.calls.get("echo", {}).values())


async def test_unread_answers_of_a_connection_are_bounded(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(BigTool())
    valve = Valve(int(gateway.address.rpartition(":")[2]))
    await valve.start()
    valve.open.set()
    async with AsyncSandboxClient(valve.address) as client:
        assert (await client.call("echo", "first", timeout_s=20)).status == "ok"
        valve.open.clear()
        calls = [asyncio.create_task(client.call("echo", "x", timeout_s=40)) for _ in range(NUM_CALLS)]
        with SandboxClient(gateway.address) as other:
            async with asyncio.timeout(60):
                while await num_answered(other) < 1 + NUM_CALLS:
                    pass
        async with AsyncSandboxClient(gateway.address) as neighbour:
            assert (await neighbour.call("echo", "on another connection", timeout_s=20)).status == "ok"
        valve.open.set()
        results = await asyncio.gather(*calls)
        refused = [result for result in results if result.status == "unavailable"]
        assert len(refused) >= NUM_CALLS - unread.MAX_CONNECTION_BYTES // ANSWER_BYTES - 30  # what the way itself holds
        assert all("has not read" in result.message for result in refused)
        assert {result.status for result in results} == {"ok", "unavailable"}
        # Once it reads again, it is served again.
        assert (await client.call("echo", "again", timeout_s=20)).status == "ok"
    await valve.close()


def test_the_bound_of_all_connections_meets_those_with_more_than_their_share() -> None:
    count, mib = unread.Unread(), 1 << 20
    for number in range(10):
        count.add(f"slow-{number}", 6 * mib)
    count.add("modest", 3 * mib)
    assert not count.refusal("slow-0")
    count.add("slow-0", 6 * mib)  # 69 MiB in all, of 64
    assert f"{12 * mib} bytes" in count.refusal("slow-0")
    assert f"at most {unread.MAX_TOTAL_BYTES // 11} now" in count.refusal("slow-0")
    assert count.refusal("slow-1")
    assert not count.refusal("modest")
    assert not count.refusal("another")
    for number in range(10):
        count.remove(f"slow-{number}", 6 * mib)
    assert not count.refusal("slow-0")


async def test_memory_for_unread_answers_is_given_back(tmp_path: Path) -> None:
    with gateway_process(SandboxConfig(), tmp_path / "log") as gateway:
        valve = Valve(int(gateway.address.rpartition(":")[2]))
        await valve.start()
        valve.open.set()
        async with AsyncSandboxClient(valve.address) as client:
            assert (await client.call("echo", "first", timeout_s=20)).status == "ok"
            before = rss(gateway.pid)
            valve.open.clear()
            calls = [asyncio.create_task(client.call("echo", "x", timeout_s=40)) for _ in range(MANY_CALLS)]
            async with asyncio.timeout(60):
                with SandboxClient(gateway.address) as other:
                    while await num_answered(other) < 1 + MANY_CALLS:
                        pass
            held = rss(gateway.pid) - before
            assert held > unread.MAX_CONNECTION_BYTES
            valve.open.set()
            await asyncio.gather(*calls)
            async with asyncio.timeout(20):
                while rss(gateway.pid) - before > held / 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        await valve.close()


def rss(pid: int) -> int:
    size: int = psutil.Process(pid).memory_info().rss
    return size
