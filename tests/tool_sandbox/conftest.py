"""One gateway with real containers for the whole room's tests."""

from collections.abc import Iterator

import pytest

from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import LocalGateway


@pytest.fixture(scope="session")
def gateway() -> Iterator[LocalGateway]:
    with LocalGateway(SandboxConfig(num_containers=2, slots_per_container=2, memory_mib=256)) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def client(gateway: LocalGateway) -> Iterator[SandboxClient]:
    with SandboxClient(gateway.address) as client:
        yield client
