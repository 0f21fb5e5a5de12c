"""A run's own gateway: what becomes of the run's tool calls when its process is killed."""

import asyncio
import contextlib
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


def gateways_of_this_process() -> set[int]:
    found = set()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if "tool_sandbox.server" in process.cmdline():
                found.add(process.pid)
    return found


@pytest.mark.timeout(240)
def test_a_killed_gateway_comes_back_at_its_address_and_calls_wait_for_it(tmp_path: Path) -> None:
    """A run whose gateway was killed went on for hours with tools that answered nothing."""
    settings = {"num_containers": 1, "num_spares": 0, "slots_per_container": 1}
    config = parse({"model": "m", "run_dir": str(tmp_path), "sandbox": settings})
    others = gateways_of_this_process()  # of tests that share one

    async def calls() -> list[str]:
        tools = Tools(session.access)
        try:
            call = ToolCall(tool="python", content="print(6 * 7)")
            found = [await tools.call(call, 5.0)]
            (pid,) = gateways_of_this_process() - others
            os.kill(pid, signal.SIGKILL)
            found += await asyncio.gather(*(tools.call(call, 5.0) for _ in range(3)))
        finally:
            await tools.close()
        assert pid not in gateways_of_this_process()
        return [result.output for result in found]

    with sandbox_session(config) as session:
        assert asyncio.run(calls()) == ["42\n"] * 4
    assert gateways_of_this_process() <= others
