"""Mutual TLS with real certificates and a real gRPC server: who gets in, who doesn't, and what is told."""

import asyncio
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from actors.config import ToolAccess
from actors.tools import Tools
from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig, TlsFiles
from tool_sandbox.errors import TlsError
from tool_sandbox.failover import FailoverClient, Site
from tool_sandbox.server import Gateway
from trajectory.types import ToolCall, ToolResult


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


class EchoTool:
    """Stands where containers would: what is tested here is the door."""

    broken = ""

    def open(self) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def run(
        self, content: str, *, timeout_s: float, queue_s: float, session_id: str | None, client: str
    ) -> ToolResult:
        return ToolResult(status="ok", output=content)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
async def gateway(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setattr("tool_sandbox.registry.build", lambda config, metrics: {"echo": EchoTool()})
    tls = authority.issue("gateway", "localhost")
    gateway = Gateway(SandboxConfig(address="localhost:0", tls=tls, metrics_address="localhost:0"))
    gateway.open()
    await gateway.start()
    yield gateway
    await gateway.stop()


async def test_a_client_with_a_certificate_of_the_ca_gets_in(gateway: Gateway, authority: Authority) -> None:
    async with AsyncSandboxClient(gateway.address, tls=authority.issue("client", "anywhere")) as client:
        result = await client.call("echo", "hello", timeout_s=20)
    assert (result.status, result.output) == ("ok", "hello"), result.message


async def test_one_name_serves_gateways_whose_hosts_nobody_knew_beforehand(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tool_sandbox.registry.build", lambda config, metrics: {"echo": EchoTool()})
    gateway = Gateway(SandboxConfig(address="127.0.0.1:0", tls=authority.issue("gateway", "sandbox.internal")))
    gateway.open()
    await gateway.start()
    files = authority.issue("client", "anywhere")
    try:
        for name, status in (("sandbox.internal", "ok"), ("another.name", "unavailable"), ("", "unavailable")):
            tls = files.model_copy(update={"name": name})
            async with AsyncSandboxClient(gateway.address, tls=tls, queue_timeout_s=0.0) as client:
                assert (await client.call("echo", "hello", timeout_s=10)).status == status, name
            async with FailoverClient([Site(gateway.address)], tls=tls, queue_timeout_s=0.0) as several:
                assert (await several.call("echo", "hello", timeout_s=10)).status == status, name
    finally:
        await gateway.stop()


async def test_actors_bring_the_certificate_with_their_tool_calls(gateway: Gateway, authority: Authority) -> None:
    """The part of rollout and repair actors that calls tools, as they make it from their settings."""
    access = ToolAccess(sandbox_address=gateway.address, sandbox_tls=authority.issue("rollout", "anywhere"))
    tools = Tools(ToolAccess.model_validate(access.model_dump()))  # settings travel to their actors
    result = await tools.call(ToolCall(tool="echo", content="hello"), 20.0)
    await tools.close()
    assert (result.status, result.output) == ("ok", "hello"), result.message
    missing = access.model_copy(
        update={"sandbox_tls": TlsFiles(cert="/no/such.pem", key="/no/such.key", ca="/no/ca.pem")}
    )
    with pytest.raises(TlsError, match=r"sandbox\.tls\.key: /no/such\.key can't be read"):
        Tools(missing)


async def test_nobody_else_gets_in(gateway: Gateway, tmp_path: Path) -> None:
    """With a certificate of another CA, even while trusting ours; and without any."""
    ours, theirs = tmp_path / "ours-ca.pem", Authority(tmp_path, "theirs").issue("client", "anywhere")
    for tls in (theirs.model_copy(update={"ca": str(ours)}), theirs, None):
        async with AsyncSandboxClient(gateway.address, tls=tls, queue_timeout_s=0.0) as client:
            result = await client.call("echo", "let me in", timeout_s=1.0)
        assert (result.status, result.output) == ("unavailable", "")


async def test_a_client_refuses_a_gateway_of_another_ca(gateway: Gateway, authority: Authority, tmp_path: Path) -> None:
    """The gateway would let it in; it does not trust the gateway."""
    Authority(tmp_path, "theirs")
    tls = authority.issue("client", "anywhere").model_copy(update={"ca": str(tmp_path / "theirs-ca.pem")})
    async with AsyncSandboxClient(gateway.address, tls=tls, queue_timeout_s=0.0) as client:
        assert (await client.call("echo", "secret", timeout_s=1.0)).status == "unavailable"


async def test_metrics_beyond_loopback_ask_for_a_certificate_too(gateway: Gateway, authority: Authority) -> None:
    files = authority.issue("prometheus", "anywhere")
    known = ssl.create_default_context(cafile=files.ca)
    stranger = ssl.create_default_context(cafile=files.ca)
    known.load_cert_chain(files.cert, files.key)
    for context in (known, stranger):  # their certificates are for tests, and lack what strict checks want
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT

    def ask(context: ssl.SSLContext) -> bytes:
        url = f"https://{gateway.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=20, context=context) as reply:
            body: bytes = reply.read()
            return body

    assert b"autotraj_sandbox_queue_length" in await asyncio.to_thread(ask, known)
    with pytest.raises((urllib.error.URLError, OSError)):
        await asyncio.to_thread(ask, stranger)


def test_files_that_are_none_are_told_by_name(authority: Authority, tmp_path: Path) -> None:
    good = authority.issue("client", "anywhere")
    with pytest.raises(TlsError, match=r"sandbox\.tls\.cert: .*missing\.pem can't be read"):
        SandboxClient("localhost:1", tls=good.model_copy(update={"cert": str(tmp_path / "missing.pem")}))
    with pytest.raises(TlsError, match=r"sandbox\.tls\.key: .* holds no PRIVATE KEY"):
        SandboxClient("localhost:1", tls=good.model_copy(update={"key": good.cert}))
    with pytest.raises(ValueError, match="ca"):
        TlsFiles.model_validate({"cert": "c", "key": "k"})


def test_a_key_of_another_certificate_is_told_at_start(authority: Authority) -> None:
    files = authority.issue("gateway", "localhost")
    files = files.model_copy(update={"key": authority.issue("other", "localhost").key})
    with pytest.raises(TlsError, match=r"sandbox\.tls\.key: .*don't belong together"):
        Gateway(SandboxConfig(tls=files)).open()
    with pytest.raises(TlsError, match="don't belong together"):
        SandboxClient("localhost:1", tls=files)


def test_an_expired_certificate_is_refused_at_start_with_its_date(authority: Authority) -> None:
    day = (datetime.now(UTC) - timedelta(days=3)).date()
    with pytest.raises(TlsError, match=rf"sandbox\.tls\.cert: .* expired on {day}"):
        Gateway(SandboxConfig(tls=authority.issue("old", "localhost", days=-3))).open()


async def test_a_tls_client_of_a_plain_gateway_hears_so(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tool_sandbox.registry.build", lambda config, metrics: {"echo": EchoTool()})
    gateway = Gateway(SandboxConfig())
    gateway.open()
    await gateway.start()
    async with AsyncSandboxClient(gateway.address, tls=authority.issue("client", "anywhere")) as client:
        result = await client.call("echo", "hello", timeout_s=20)
    await gateway.stop()
    assert result.status == "rejected"
    assert "doesn't speak TLS" in result.message


def test_beyond_loopback_metrics_need_tls(authority: Authority) -> None:
    with pytest.raises(ValueError, match=r"metrics_address '0\.0\.0\.0:9090' is reachable from outside"):
        SandboxConfig(metrics_address="0.0.0.0:9090", token="a token does not help here")
    tls = authority.issue("gateway", "localhost")
    assert SandboxConfig(address="0.0.0.0:1", metrics_address="0.0.0.0:9090", tls=tls).token == ""
