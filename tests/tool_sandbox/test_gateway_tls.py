"""Mutual TLS with real certificates and a real gRPC server: who gets in, who doesn't, and what is told."""

import asyncio
import re
import ssl
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import Authority
from own_gateways import StartGateway

from actors.config import ToolAccess
from actors.tools import Tools
from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig, TlsFiles
from tool_sandbox.errors import RefusedError, TlsError
from tool_sandbox.failover import FailoverClient, Site
from tool_sandbox.server import Gateway
from tool_sandbox.tls import check_files
from trajectory.types import ToolCall, ToolResult


async def asked_both_ways(address: str, tls: TlsFiles | None) -> list[ToolResult]:
    """What a client hears, and one of several gateways. Both have far more time than they may take."""
    async with (
        AsyncSandboxClient(address, tls=tls, queue_timeout_s=0.0) as one,
        FailoverClient([Site(address)], tls=tls, queue_timeout_s=0.0) as several,
    ):
        return [await client.call("echo", "hello", timeout_s=5) for client in (one, several)]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
async def gateway(authority: Authority, start_gateway: StartGateway) -> Gateway:
    tls = authority.issue("gateway", "localhost")
    return await start_gateway(address="localhost:0", tls=tls, metrics_address="localhost:0")


async def test_a_client_with_a_certificate_of_the_ca_gets_in(gateway: Gateway, authority: Authority) -> None:
    async with AsyncSandboxClient(gateway.address, tls=authority.issue("client", "anywhere")) as client:
        result = await client.call("echo", "hello", timeout_s=20)
    assert (result.status, result.output) == ("ok", "hello"), result.message


async def test_one_name_serves_gateways_whose_hosts_nobody_knew_beforehand(
    authority: Authority, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(tls=authority.issue("gateway", "sandbox.internal"))
    files = authority.issue("client", "anywhere")
    for name, status in (("sandbox.internal", "ok"), ("another.name", "rejected"), ("", "rejected")):
        for result in await asked_both_ways(gateway.address, files.model_copy(update={"name": name})):
            assert result.status == status, result.message
            assert (f"is for another name than {name or '127.0.0.1'}: set sandbox.tls.name" in result.message) == (
                status == "rejected"
            ), result.message


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


async def test_nobody_else_gets_in_and_each_is_told_its_setting_at_once(
    gateway: Gateway, authority: Authority, tmp_path: Path
) -> None:
    """With a certificate of another CA, even while trusting ours; with one that expired; and without any."""
    ours, theirs = tmp_path / "ours-ca.pem", Authority(tmp_path, "theirs").issue("client", "anywhere")
    for tls, setting in (
        (
            theirs.model_copy(update={"ca": str(ours)}),
            r"refused the certificate .*theirs-client\.pem.*sandbox\.tls\.cert",
        ),
        (theirs, r"certificate of sandbox gateway localhost:\d+ .*issuer.*sandbox\.tls\.ca"),
        (None, r"speaks TLS and this client doesn't.*sandbox\.tls"),
    ):
        for result in await asked_both_ways(gateway.address, tls):
            assert (result.status, result.output) == ("rejected", "")
            assert re.search(setting, result.message), result.message
            assert result.message.count("\n") == 0
        with pytest.raises(RefusedError, match=setting), SandboxClient(gateway.address, tls=tls) as client:
            await asyncio.to_thread(client.stats, 20)


async def test_a_client_refuses_a_gateway_of_another_ca(gateway: Gateway, authority: Authority, tmp_path: Path) -> None:
    """The gateway would let it in; it does not trust the gateway."""
    Authority(tmp_path, "theirs")
    tls = authority.issue("client", "anywhere").model_copy(update={"ca": str(tmp_path / "theirs-ca.pem")})
    for result in await asked_both_ways(gateway.address, tls):
        assert result.status == "rejected"
        assert "sandbox.tls.ca" in result.message


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
    with pytest.raises(TlsError, match=r"sandbox\.tls\.key: .*doesn't belong to the certificate"):
        Gateway(SandboxConfig(tls=files)).open()
    with pytest.raises(TlsError, match="doesn't belong to the certificate"):
        SandboxClient("localhost:1", tls=files)


def test_an_expired_certificate_is_refused_at_start_with_its_date(authority: Authority) -> None:
    day = (datetime.now(UTC) - timedelta(days=3)).date()
    with pytest.raises(TlsError, match=rf"sandbox\.tls\.cert: .* expired on {day}"):
        Gateway(SandboxConfig(tls=authority.issue("old", "localhost", days=-3))).open()


def test_an_authority_that_is_expired_or_cut_short_is_refused(authority: Authority, tmp_path: Path) -> None:
    """gRPC would only never connect."""
    files = authority.issue("mine", "localhost")
    with pytest.raises(TlsError, match=r"sandbox\.tls\.ca: .* expired on"):
        check_files(files.model_copy(update={"ca": authority.issue("old", "localhost", days=-3).cert}))
    cut = tmp_path / "cut.pem"
    cut.write_bytes(Path(files.ca).read_bytes()[:200])
    with pytest.raises(TlsError, match=r"sandbox\.tls\.ca: .*cut\.pem holds no certificate that can be read"):
        check_files(files.model_copy(update={"ca": str(cut)}))


async def test_a_tls_client_of_a_plain_gateway_hears_so(authority: Authority, start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    for result in await asked_both_ways(gateway.address, authority.issue("client", "anywhere")):
        assert result.status == "rejected"
        assert "doesn't speak TLS and this client does: set sandbox.tls" in result.message


async def test_a_port_of_another_service_is_told(
    authority: Authority, gateway: Gateway, start_gateway: StartGateway
) -> None:
    plain = await start_gateway(metrics_address="127.0.0.1:0")
    files = authority.issue("client", "anywhere")
    for address, tls in ((plain.metrics_address, None), (gateway.metrics_address, files)):
        for result in await asked_both_ways(address, tls):
            assert result.status == "rejected"
            assert f"what answers at {address} is no sandbox gateway" in result.message


async def test_a_gateway_that_is_not_there_may_come_back(authority: Authority) -> None:
    """Nobody listens; or somebody does, and hangs up on everyone, as one that is just ending does."""
    hangs_up = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    addresses = [f"127.0.0.1:{hangs_up.sockets[0].getsockname()[1]}", "127.0.0.1:1"]
    for address in addresses:
        for tls in (None, authority.issue("client", "anywhere")):
            async with AsyncSandboxClient(address, tls=tls, queue_timeout_s=0.0) as client:
                result = await client.call("echo", "hello", timeout_s=5)
            assert result.status == "unavailable", result.message
    hangs_up.close()


def test_beyond_loopback_metrics_need_tls(authority: Authority) -> None:
    with pytest.raises(ValueError, match=r"metrics_address '0\.0\.0\.0:9090' is reachable from outside"):
        SandboxConfig(metrics_address="0.0.0.0:9090", token="a token does not help here")
    tls = authority.issue("gateway", "localhost")
    assert SandboxConfig(address="0.0.0.0:1", metrics_address="0.0.0.0:9090", tls=tls).token == ""
