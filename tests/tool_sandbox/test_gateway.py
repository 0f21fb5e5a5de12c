"""The gateway: who may call it, what it does with garbage, and what happens when something dies."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tool_sandbox import wire
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import AddressError, ImageError
from tool_sandbox.local import LocalGateway, local_sandbox
from trajectory.types import ToolResult

pytestmark = pytest.mark.docker

ROOT = Path(__file__).resolve().parents[2]
Names = Callable[[int], list[str]]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("token", ["", "open sesame street", "sesame", "wrong"])
def test_a_wrong_token_is_refused(strict_gateway: LocalGateway, token: str) -> None:
    with SandboxClient(strict_gateway.address, token=token) as client:
        result = client.call("python", "print(1)")
    assert (result.status, result.output) == ("rejected", "")
    assert result.message == f"sandbox gateway {strict_gateway.address} refused the token"


def test_garbage_is_rejected_and_the_gateway_lives(roomy: SandboxClient) -> None:
    options = [("grpc.max_send_message_length", 8 << 20)]
    with grpc.insecure_channel(roomy.address, options=options) as channel:
        call = channel.unary_unary(wire.CALL_PATH)
        for data in (b"", b"garbage", b"\xc1", b"\xdf\xff\xff\xff\xff", b"\x81\xa4tool\xa6python"):
            assert wire.decode_result(call(data, timeout=10)).status == "rejected"
        with pytest.raises(grpc.RpcError) as raised:
            call(bytes(3 << 20), timeout=10)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/autotraj.ToolSandbox/Shutdown")(b"", timeout=10)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    host, _, port = roomy.address.rpartition(":")
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000)):
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall(data)
    assert roomy.call("python", "print('alive')").output == "alive\n"


def test_a_full_queue_and_a_long_wait_are_unavailable(strict: SandboxClient) -> None:
    """One slot, and one may wait, for three seconds."""
    results: dict[str, ToolResult] = {}

    def call(name: str, code: str) -> None:
        results[name] = strict.call("python", code, timeout_s=6)

    threads = [threading.Thread(target=call, args=("runs", "import time; time.sleep(4)"))]
    threads += [threading.Thread(target=call, args=(name, "1")) for name in ("waits", "is too many")]
    for thread in threads:
        thread.start()
        time.sleep(0.4)
    for thread in threads:
        thread.join(30)
    assert results["runs"].status == "ok"
    assert results["waits"].status == results["is too many"].status == "unavailable"
    assert "waited 3.0 s for a slot" in results["waits"].message
    assert results["waits"].queue_s > 2.9  # two clocks: it may read as 2.9997
    assert "sandbox.max_queue" in results["is too many"].message
    assert results["is too many"].queue_s < 1.0
    assert results["is too many"].retry_after_s is not None


def test_a_port_in_use_is_an_error_with_a_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AddressError, match="in use or not ours; choose another"):
            LocalGateway(SandboxConfig(address=f"127.0.0.1:{taken.getsockname()[1]}"))


def test_a_missing_image_is_an_error_with_a_remedy() -> None:
    config = SandboxConfig(image="autotraj-sandbox:there-is-no-such")
    with pytest.raises(ImageError, match="docker pull autotraj-sandbox"), local_sandbox(config):
        pass


def test_killed_containers_fail_their_calls_and_are_replaced(
    roomy: SandboxClient, roomy_gateway: LocalGateway, containers_of: Names
) -> None:
    results: list[ToolResult] = []
    code = "import time; time.sleep(40)"
    thread = threading.Thread(target=lambda: results.append(roomy.call("python", code, timeout_s=50)))
    roomy.call("python", "x = 1", session_id="lost")
    thread.start()
    time.sleep(0.5)
    names = containers_of(roomy_gateway.pid)
    assert len(names) == 2
    subprocess.run(["docker", "kill", *names], check=True, capture_output=True, timeout=20)
    killed = time.monotonic()
    thread.join(10)
    assert results[0].status == "unavailable"
    assert "died" in results[0].message
    # Whoever comes at that very moment may be told `unavailable`, too; nobody waits for long.
    wait_until(lambda: roomy.call("python", "print('again')").output == "again\n", 20)
    result = roomy.call("python", "print('x' in globals())", session_id="lost")
    assert (result.output, result.fresh) == ("False\n", True)
    wait_until(lambda: len(set(containers_of(roomy_gateway.pid)) - set(names)) == 2, 20 - (time.monotonic() - killed))


def test_a_gateway_ends_with_its_parent_and_its_containers_with_it(containers_of: Names) -> None:
    script = """
import sys, time
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import LocalGateway
gateway = LocalGateway(SandboxConfig(num_containers=1, num_spares=0, slots_per_container=1, start_timeout_s=120))
print(gateway.pid, flush=True)
time.sleep(300)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert len(containers_of(pid)) == 1
    finally:
        parent.kill()
        parent.communicate(timeout=20)
    wait_until(lambda: not is_alive(pid), 10)
    wait_until(lambda: containers_of(pid) == [], 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_gateway_that_is_ended_during_start_up_leaves_nothing(number: signal.Signals, containers_of: Names) -> None:
    config = SandboxConfig(num_containers=2, slots_per_container=1)
    command = [sys.executable, "-m", "tool_sandbox.server", str(os.getpid())]
    gateway = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert gateway.stdin is not None
    gateway.stdin.write(config.model_dump_json().encode())
    gateway.stdin.close()
    wait_until(lambda: containers_of(gateway.pid) != [], 60)
    gateway.send_signal(number)
    assert gateway.wait(15) == (0 if number == signal.SIGTERM else -9)
    assert gateway.stdout is not None
    gateway.stdout.close()
    wait_until(lambda: containers_of(gateway.pid) == [], 10)


def test_local_sandbox_answers_within_its_block_only() -> None:
    with local_sandbox(num_containers=1, num_spares=0, slots_per_container=1, start_timeout_s=120) as client:
        assert client.call("python", "print(2+2)").output == "4\n"
        address = client.address
    with SandboxClient(address, queue_timeout_s=0.5) as late:
        assert late.call("python", "1", timeout_s=0.5).status == "unavailable"
