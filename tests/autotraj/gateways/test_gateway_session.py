"""A run's own gateway: what becomes of the run's tool calls when its process is killed."""

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from actors.tools import Tools
from autotraj.config.run import parse
from autotraj.gateways.session import sandbox_session
from trajectory.types import ToolCall

pytestmark = pytest.mark.docker


def gateways_of_this_process() -> list[int]:
    return [p.pid for p in psutil.Process().children() if "tool_sandbox.server" in p.cmdline()]


@pytest.mark.timeout(240)
def test_a_killed_gateway_comes_back_at_its_address_and_calls_wait_for_it(tmp_path: Path) -> None:
    """A run whose gateway was killed went on for hours with tools that answered nothing."""
    settings = {"num_containers": 1, "num_spares": 0, "slots_per_container": 1}
    config = parse({"model": "m", "run_dir": str(tmp_path), "sandbox": settings})

    async def calls() -> list[str]:
        tools = Tools(session.access)
        try:
            call = ToolCall(tool="python", content="print(6 * 7)")
            found = [await tools.call(call, 5.0)]
            (pid,) = gateways_of_this_process()
            os.kill(pid, signal.SIGKILL)
            found += await asyncio.gather(*(tools.call(call, 5.0) for _ in range(3)))
        finally:
            await tools.close()
        assert gateways_of_this_process() != [pid]
        return [result.output for result in found]

    with sandbox_session(config) as session:
        assert asyncio.run(calls()) == ["42\n"] * 4
    assert gateways_of_this_process() == []
