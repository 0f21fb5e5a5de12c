"""Gateways with real containers: one that is roomy, and one whose next call always comes into the slot of the last; and
gateways of the test's own process, for tests of the door."""

import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from own_gateways import StandIn, StartGateway

from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import LocalGateway
from tool_sandbox.server import Gateway

ROOMY = SandboxConfig(
    num_containers=2,
    num_spares=0,
    slots_per_container=2,
    memory_mib=256,
    scratch_mib=16,
    max_output_bytes=300_000,
    start_timeout_s=120,
)
STRICT = SandboxConfig(
    num_containers=1,
    num_spares=0,
    slots_per_container=1,
    token="open sesame",
    max_queue=1,
    queue_timeout_s=3.0,
    start_timeout_s=120,
)


@pytest.fixture(scope="session")
def roomy_gateway() -> Iterator[LocalGateway]:
    with LocalGateway(ROOMY) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def roomy(roomy_gateway: LocalGateway) -> Iterator[SandboxClient]:
    with SandboxClient(roomy_gateway.address) as client:
        yield client


@pytest.fixture(scope="session")
def strict_gateway() -> Iterator[LocalGateway]:
    with LocalGateway(STRICT) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def strict(strict_gateway: LocalGateway) -> Iterator[SandboxClient]:
    with SandboxClient(strict_gateway.address, token=STRICT.token) as client:
        yield client


@pytest.fixture(scope="session")
def containers_of() -> Callable[[int], list[str]]:
    """Names of the containers of the gateway with a given pid."""

    def names(pid: int) -> list[str]:
        command = ["docker", "ps", "--filter", f"name=autotraj-{pid}-", "--format", "{{.Names}}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()

    return names


@pytest.fixture(scope="session")
def gateway(roomy_gateway: LocalGateway) -> LocalGateway:
    """Any will do."""
    return roomy_gateway


@pytest.fixture(scope="session")
def client(roomy: SandboxClient) -> SandboxClient:
    """Any will do."""
    return roomy


@pytest.fixture
async def start_gateway(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartGateway]:
    """`await start_gateway(tool, **settings)`: a gateway in this process whose only tool is `echo`, until the test's end."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(tool: StandIn | None = None, **settings: Any) -> Gateway:
            tools = {"echo": tool or StandIn()}
            monkeypatch.setattr("tool_sandbox.registry.build_tools", lambda config, metrics: tools)
            gateway = Gateway(SandboxConfig(**settings))
            gateway.open()
            await gateway.start()
            stack.push_async_callback(gateway.stop)
            return gateway

        yield start
