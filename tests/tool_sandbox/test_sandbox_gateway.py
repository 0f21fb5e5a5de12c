"""The gateway when its containers, or it itself, die, and when calls are cancelled."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import AddressError
from tool_sandbox.left_behind import LABEL, remove_left_behind
from tool_sandbox.local import ROOT, LocalGateway
from trajectory.types import ToolResult

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def doomed() -> Iterator[LocalGateway]:
    """One container, one slot; bereft of its container and at last killed by the tests that follow."""
    config = SandboxConfig(num_containers=1, num_spares=0, slots_per_container=1)
    with LocalGateway(config) as gateway:
        yield gateway


def containers(gateway: LocalGateway) -> list[str]:
    command = ["docker", "ps", "--filter", f"name=autotraj-{gateway.pid}-", "--format", "{{.Names}}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s"
        time.sleep(0.1)


def test_a_taken_port_is_told(doomed: LocalGateway) -> None:
    with pytest.raises(AddressError, match="port is in use"):
        LocalGateway(SandboxConfig(address=doomed.address))


def test_a_killed_container_answers_and_is_replaced(doomed: LocalGateway) -> None:
    with SandboxClient(doomed.address) as client:
        (before,) = containers(doomed)
        results: list[ToolResult] = []
        code = "import time; time.sleep(20)"
        call = threading.Thread(
            target=lambda: results.append(client.call("python", code, timeout_s=30, session_id="s"))
        )
        call.start()
        time.sleep(1.0)
        subprocess.run(["docker", "kill", before], check=True, capture_output=True)
        call.join(60)
        assert [r.status for r in results] == ["unavailable"]
        assert before in results[0].message
        after = client.call("python", "print(2)", timeout_s=20, session_id="s")  # waits for the replacement
        assert (after.status, after.output, after.fresh) == ("ok", "2\n", True)
        assert before not in containers(doomed)


def test_containers_end_with_a_killed_gateway(doomed: LocalGateway) -> None:
    assert len(containers(doomed)) == 1
    os.kill(doomed.pid, signal.SIGKILL)
    wait_for(lambda: containers(doomed) == [])


def test_a_terminals_ctrl_c_leaves_the_gateway_to_its_owner() -> None:
    """The terminal sends it to all processes in the foreground; the owner may want to finish a step that calls tools."""
    code = (
        "import os, signal, subprocess\nfrom tool_sandbox.client import SandboxClient\n"
        "from tool_sandbox.config import SandboxConfig\nfrom tool_sandbox.local import LocalGateway\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "with LocalGateway(SandboxConfig(num_containers=1)) as gateway, SandboxClient(gateway.address) as client:\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    try:\n"
        "        gateway.wait(3)\n"
        "    except subprocess.TimeoutExpired:\n"
        "        print(client.call('python', 'print(3)', timeout_s=20).output, end='')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, process_group=0
    )
    assert done.stdout == "3\n"


def test_containers_of_a_dead_owner_are_removed() -> None:
    """Made with a label of a process that is gone, as after a crash of the engine that kept them alive."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    image = subprocess.run(
        ["docker", "image", "ls", "--quiet", "autotraj-sandbox"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    for name, owner in (("autotraj-test-dead", f"{namespace}-4194303-1"), ("autotraj-test-elsewhere", "1-1-1")):
        command = ["docker", "create", "--name", name, "--label", f"{LABEL}={owner}", image]
        subprocess.run(command, check=True, capture_output=True)
    try:
        assert remove_left_behind() == ["autotraj-test-dead"]
    finally:
        subprocess.run(["docker", "rm", "-f", "autotraj-test-dead", "autotraj-test-elsewhere"], capture_output=True)


async def test_a_cancelled_call_in_its_first_moments_leaves_nothing(gateway: LocalGateway) -> None:
    """Between fork and the loss of root it can't be killed by its uid yet."""
    async with AsyncSandboxClient(gateway.address) as client:
        for delay_s in (0.0, 0.001, 0.002, 0.003, 0.005, 0.008):
            calls = [asyncio.create_task(client.call("python", "while True: pass", timeout_s=50)) for _ in range(4)]
            await asyncio.sleep(delay_s)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        results = await asyncio.gather(*(client.call("python", "print(1)", timeout_s=4) for _ in range(4)))
        assert [(r.status, r.output) for r in results] == [("ok", "1\n")] * 4
