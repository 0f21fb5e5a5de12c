"""A client that sends calls and reads no answers costs the gateway a bounded number of bytes, and nobody else a call."""

import asyncio
import contextlib
from typing import Any

from conftest import StandIn, StartGateway

from tool_sandbox import server
from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from trajectory.types import ToolResult

ANSWER_BYTES = 1_000_000
NUM_CALLS = 120


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
        assert len(refused) >= NUM_CALLS - server.MAX_UNREAD_BYTES // ANSWER_BYTES - 30  # what the way itself holds
        assert all("has not read" in result.message for result in refused)
        assert {result.status for result in results} == {"ok", "unavailable"}
        # Once it reads again, it is served again.
        assert (await client.call("echo", "again", timeout_s=20)).status == "ok"
    await valve.close()
