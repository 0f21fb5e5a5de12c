"""Gateways without containers: in the test's process, or in a process of their own."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import ROOT
from tool_sandbox.server import Gateway
from trajectory.types import ToolResult


class StandIn:
    """Stands where containers would: answers what it was sent, at once."""

    broken = ""

    def open(self) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def run(
        self, content: str, *, timeout_s: float, queue_s: float, session_id: str | None, client: str
    ) -> ToolResult:
        return ToolResult(status="ok", output=content)


StartGateway = Callable[..., Awaitable[Gateway]]


# A gateway's own process, with a tool that needs no container: it answers half a megabyte for an `x`, and `slow` never.
PROGRAM = """
import asyncio, sys
from own_gateways import StandIn
from tool_sandbox import registry, server
class Slow(StandIn):
    async def run(self, content, **others):
        await asyncio.sleep(60 if content == "slow" else 0)
        return await super().run(content * 2**19 if content == "x" else content, **others)
registry.build_tools = lambda config, metrics: {"echo": Slow()}
sys.exit(server.main())
"""


@dataclass(frozen=True)
class GatewayProcess:
    """A gateway of its own process, without containers."""

    pid: int
    address: str
    metrics_address: str
    log: Path


@contextlib.contextmanager
def gateway_process(config: SandboxConfig, log: Path) -> Iterator[GatewayProcess]:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    command = [sys.executable, "-c", PROGRAM, str(os.getpid())]
    pipe = subprocess.PIPE
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=file)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(config.model_dump_json().encode())
        process.stdin.close()
        message = json.loads(process.stdout.readline())
        yield GatewayProcess(process.pid, message["address"], message["metrics_address"], log)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()
