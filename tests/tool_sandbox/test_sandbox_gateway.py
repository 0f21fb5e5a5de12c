"""The gateway under trouble: death, overload, cancellation, strangers. Every wait ends and says so."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import AddressError, ImageError
from tool_sandbox.left_behind import LABEL, remove_left_behind
from tool_sandbox.local import ROOT, LocalGateway
from trajectory.types import ToolResult

pytestmark = pytest.mark.docker


TOKEN = "s3cret"


@pytest.fixture(scope="module")
def doomed() -> Iterator[LocalGateway]:
    """One container, one slot, a token; overloaded, bereft of its container and at last killed by the tests that follow."""
    config = SandboxConfig(num_containers=1, num_spares=0, slots_per_container=1, max_queue=1, token=TOKEN)
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


def test_a_stranger_is_refused(doomed: LocalGateway) -> None:
    for token in ("", "wrong", TOKEN + "x"):
        with SandboxClient(doomed.address, token=token) as stranger:
            result = stranger.call("python", "print(1)")
            assert (result.status, result.output) == ("rejected", "")
            assert "token" in result.message
    with SandboxClient(doomed.address, token=TOKEN) as client:
        assert client.call("python", "print(1)").output == "1\n"


def test_a_taken_port_is_told(doomed: LocalGateway) -> None:
    with pytest.raises(AddressError, match="port is in use"):
        LocalGateway(SandboxConfig(address=doomed.address))


def test_queue_overflow_and_queue_timeout(doomed: LocalGateway) -> None:
    results: dict[str, ToolResult] = {}

    def call(name: str) -> None:
        with SandboxClient(doomed.address, token=TOKEN, queue_timeout_s=0.0) as client:
            results[name] = client.call("python", "import time; time.sleep(4)", timeout_s=10)

    threads = [threading.Thread(target=call, args=(name,)) for name in ("runs", "waits", "overflows")]
    start = time.monotonic()
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(10)
    statuses = {name: result.status for name, result in results.items()}
    assert statuses == {"runs": "ok", "waits": "unavailable", "overflows": "unavailable"}
    assert "waited 2." in results["waits"].message
    assert "max_queue" in results["overflows"].message
    assert results["overflows"].retry_after_s is not None
    assert time.monotonic() - start < 30


def test_a_killed_container_answers_and_is_replaced(doomed: LocalGateway) -> None:
    with SandboxClient(doomed.address, token=TOKEN) as client:
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


def test_a_gateway_ends_with_its_killed_parent() -> None:
    code = (
        "import os, signal\nfrom tool_sandbox.config import SandboxConfig\nfrom tool_sandbox.local import LocalGateway\n"
        "gateway = LocalGateway(SandboxConfig(num_containers=1))\nprint(gateway.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    pid = int(done.stdout)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}") or "(zombie)" in Path(f"/proc/{pid}/status").read_text())


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


async def test_cancelling_a_call_kills_its_code(gateway: LocalGateway, client: SandboxClient) -> None:
    async with AsyncSandboxClient(gateway.address) as other:
        # All slots, so that no later call could run if one of them were still taken.
        calls = [asyncio.create_task(other.call("python", "while True: pass", timeout_s=50)) for _ in range(4)]
        await asyncio.sleep(1.0)
        start = time.monotonic()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert all(call.cancelled() for call in calls)
        results = await asyncio.gather(*(other.call("python", "print(1)") for _ in range(4)))
        assert [r.status for r in results] == ["ok"] * 4
        assert time.monotonic() - start < 30


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


async def test_a_dead_address_is_unavailable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    start = time.monotonic()
    with SandboxClient(address) as client:
        result = client.call("python", "1", timeout_s=1)
    async with AsyncSandboxClient(address) as other:
        assert (await other.call("python", "1", timeout_s=1)).status == "unavailable"
    assert result.status == "unavailable"
    assert address in result.message
    assert time.monotonic() - start < 12


def test_a_silent_gateway_is_unavailable_at_the_deadline() -> None:
    """It accepts connections and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with SandboxClient(address, queue_timeout_s=0.0) as client:
            result = client.call("python", "1", timeout_s=0.5)
        assert result.status == "unavailable"
        assert time.monotonic() - start < 30


def test_a_missing_image_is_told_with_its_remedy() -> None:
    with pytest.raises(ImageError, match="docker pull no-such-image"):
        LocalGateway(SandboxConfig(image="no-such-image"))
