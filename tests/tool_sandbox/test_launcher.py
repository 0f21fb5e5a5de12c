"""The launcher, spoken to as a hostile gateway would: it starts containers of the settings, kills its own, and no more."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tool_sandbox.build import image_tag
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import ContainerEngineError, ImageError
from tool_sandbox.launcher_process import max_containers
from tool_sandbox.local import ROOT, LocalGateway

pytestmark = pytest.mark.docker
SMALL = SandboxConfig(num_containers=1, num_spares=0, slots_per_container=1, memory_mib=64, scratch_mib=1)


class Hostile:
    """Has the gateway's end of the launcher's socket."""

    def __init__(self, config: SandboxConfig) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(60)
        self.pipes: list[int] = []
        with theirs:
            command = [sys.executable, "-m", "tool_sandbox.launcher_process", str(theirs.fileno())]
            self.process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True)
        self.control.send(config.model_dump_json().encode())

    def hear(self) -> dict[str, Any]:
        data, descriptors, _, _ = socket.recv_fds(self.control, 65536, 3)
        self.pipes += descriptors
        message: dict[str, Any] = json.loads(data)
        return message

    def say(self, data: bytes | dict[str, Any]) -> dict[str, Any]:
        self.control.send(data if isinstance(data, bytes) else json.dumps(data).encode())
        return self.hear()

    def close(self) -> None:
        self.control.close()
        for pipe in self.pipes:
            os.close(pipe)
        self.process.wait(60)


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    hostile = Hostile(SMALL)
    assert hostile.hear() == {"op": "ready"}
    yield hostile
    hostile.close()


@pytest.fixture
def bystander() -> Iterator[str]:
    """A container that isn't the launcher's."""
    name = f"autotraj-test-bystander-{os.getpid()}"
    command = [
        "docker",
        "run",
        "--detach",
        "--rm",
        "--network",
        "none",
        "--name",
        name,
        "--entrypoint",
        "sleep",
        image_tag(),
        "300",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    try:
        yield name
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, timeout=60)


def running(prefix: str) -> list[str]:
    command = ["docker", "ps", "--all", "--filter", f"name={prefix}", "--format", "{{.Names}}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s"
        time.sleep(0.1)


def test_whatever_else_is_asked_is_refused(hostile: Hostile, bystander: str) -> None:
    orders: list[bytes | dict[str, Any]] = [
        b"\x80\x04.",
        b"[" * 4000,
        b'{"op": "start"' + b" " * 8000,
        b'"start"',
        {},
        {"op": "run", "command": ["docker", "ps"]},
        {"op": "start", "image": "other"},
        {"op": "start", "command": ["--privileged"]},
        {"op": "start", "name": "--privileged"},
        {"op": "kill"},
        {"op": "kill", "name": 7},
        {"op": "kill", "name": bystander},
        {"op": "kill", "name": "--help"},
        {"op": "kill", "name": [bystander]},
        {"op": "rm", "name": bystander},
        {"op": "exec", "name": bystander},
    ]
    for order in orders:
        assert hostile.say(order)["op"] == "refused", order
    assert running(bystander) == [bystander]
    assert hostile.pipes == []


def test_it_starts_so_many_and_kills_its_own_and_removes_them_when_the_gateway_is_gone(hostile: Hostile) -> None:
    limit = max_containers(SMALL)
    names = []
    for _ in range(limit):
        message = hostile.say({"op": "start"})
        assert message["op"] == "started"
        names.append(message["name"])
    assert len(hostile.pipes) == 3 * limit
    assert hostile.say({"op": "start"}) == {"op": "failed", "error": f"{limit} containers of this gateway run already"}
    assert all(name.startswith(f"autotraj-{os.getpid()}-") for name in names)
    wait_until(lambda: set(running(f"autotraj-{os.getpid()}-")) >= set(names))
    assert hostile.say({"op": "kill", "name": names[0]}) == {"op": "ended", "name": names[0]}
    assert hostile.say({"op": "start"})["op"] == "started"
    hostile.control.close()  # its input stays open: only the launcher can end them now
    assert hostile.process.wait(90) == 0
    wait_until(lambda: running(f"autotraj-{os.getpid()}-") == [])


def test_without_image_or_engine_it_says_so_and_ends() -> None:
    hostile = Hostile(SMALL.model_copy(update={"image": "no-such-image:1"}))
    message = hostile.hear()
    assert (message["op"], message["kind"]) == ("broken", ImageError.__name__)
    assert hostile.process.wait(20) == 1
    hostile.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
        with pytest.raises(ContainerEngineError, match="no Docker engine is reachable"):
            LocalGateway(SMALL)


def test_a_gateway_ends_with_its_launcher_and_its_containers_with_it(containers_of: Callable[[int], list[str]]) -> None:
    with LocalGateway(SMALL) as gateway, SandboxClient(gateway.address) as client:
        assert client.call("python", "print(1)", timeout_s=20).output == "1\n"
        (launcher,) = (int(pid) for pid in Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text().split())
        assert b"tool_sandbox.launcher_process" in Path(f"/proc/{launcher}/cmdline").read_bytes()
        os.kill(launcher, signal.SIGKILL)
        assert gateway.wait(60) == 1
        wait_until(lambda: containers_of(gateway.pid) == [])


def test_the_launcher_has_no_secret() -> None:
    with LocalGateway(SMALL.model_copy(update={"token": "open sesame"})) as gateway:
        (launcher,) = (int(pid) for pid in Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text().split())
        for name in ("cmdline", "environ"):
            assert b"sesame" not in Path(f"/proc/{launcher}/{name}").read_bytes()


def test_an_engine_without_the_runtime_is_told_before_anything_starts() -> None:
    with pytest.raises(
        ContainerEngineError, match=r"sandbox\.runtime: the Docker engine has no runtime 'kata-of-mine', only .*runc"
    ):
        LocalGateway(SMALL.model_copy(update={"runtime": "kata-of-mine"}))


def test_a_runtime_that_the_engine_has_is_used(containers_of: Callable[[int], list[str]]) -> None:
    with (
        LocalGateway(SMALL.model_copy(update={"runtime": "runc"})) as gateway,
        SandboxClient(gateway.address) as client,
    ):
        assert client.call("python", "print(1)", timeout_s=20).output == "1\n"
        (name,) = containers_of(gateway.pid)
        command = ["docker", "inspect", "--format", "{{.HostConfig.Runtime}}", name]
        used = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert used == "runc\n"
