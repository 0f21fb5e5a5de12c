"""Gateways with real containers: one that is roomy, and one whose next call always comes into the slot of the last; and
gateways of the test's own process, for tests of the door."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig, TlsFiles
from tool_sandbox.local import ROOT, LocalGateway
from tool_sandbox.server import Gateway
from trajectory.types import ToolResult

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


# A gateway's own process, with a tool that needs no container: it answers half a megabyte for an `x`, and `slow` never.
PROGRAM = """
import asyncio, sys
from conftest import StandIn
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


class Authority:
    """A CA of the test's own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._subject, self._key.public_key())
        self._write("ca", builder.add_extension(x509.BasicConstraints(True, None), critical=True))

    def issue(self, name: str, host: str, *, days: int = 1) -> TlsFiles:
        """Certificate, key and CA for `host`, valid until so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, key.public_key(), days)
        self._write(name, builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._path(name, "key").write_bytes(private)
        files = {"cert": self._path(name, "pem"), "key": self._path(name, "key"), "ca": self._path("ca", "pem")}
        return TlsFiles(**{field: str(path) for field, path in files.items()})

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int = 1) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._subject).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(days=9)).not_valid_after(now + timedelta(days=days))

    def _write(self, name: str, builder: x509.CertificateBuilder) -> None:
        signed = builder.sign(self._key, hashes.SHA256())
        self._path(name, "pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def _path(self, name: str, kind: str) -> Path:
        return self._folder / f"{self._name}-{name}.{kind}"
