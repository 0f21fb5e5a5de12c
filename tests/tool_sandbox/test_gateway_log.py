"""What clients that vanish, and those that are none, leave in a gateway's log: no traceback, and not a line for each."""

import asyncio
import contextlib
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest
from certificates import Authority
from own_gateways import GatewayProcess, gateway_process

from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig, TlsFiles
from tool_sandbox.local import ROOT

MAX_LINES = 5
"""Of a test's clients together."""
AGAIN = 8

CLIENT = """
import asyncio, sys
from tool_sandbox.client import AsyncSandboxClient
from tool_sandbox.config import TlsFiles
async def main(address, content, tls):
    client = AsyncSandboxClient(address, tls=TlsFiles.model_validate_json(tls) if tls else None)
    await client.call("echo", "hello", timeout_s=20)
    print("asks", flush=True)
    await asyncio.gather(*(client.call("echo", content, timeout_s=20) for _ in range(40)))
asyncio.run(main(*sys.argv[1:]))
"""


class Target:
    """A gateway, the files of its clients, and those of strangers."""

    def __init__(self, process: GatewayProcess, tls: TlsFiles | None, stranger: TlsFiles) -> None:
        self.log, self.address, self.metrics_address = process.log, process.address, process.metrics_address
        self.tls, self.stranger = tls, stranger

    def check(self) -> None:
        """It answers, and so has seen what came before."""
        with SandboxClient(self.address, tls=self.tls) as client:
            assert client.call("echo", "hello", timeout_s=20).output == "hello"
        context = None
        if self.tls is not None:
            context = ssl.create_default_context(cafile=self.tls.ca)
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the certificates of tests lack what strict checks want
            context.load_cert_chain(self.tls.cert, self.tls.key)
        url = f"{'https' if self.tls else 'http'}://{self.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=8, context=context) as reply:
            assert b"autotraj_sandbox_queue_length" in reply.read()


@pytest.fixture(scope="module", params=["plain", "tls"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("gateway")
    authority = Authority(folder, "ours")
    tls = authority.issue("gateway", "localhost") if request.param == "tls" else None
    config = SandboxConfig(address="localhost:0", metrics_address="localhost:0", tls=tls)
    with gateway_process(config, folder / "log") as process:
        yield Target(process, tls, Authority(folder, "theirs").issue("client", "anywhere"))


@pytest.fixture
def target(gateway: Target) -> Iterator[Target]:
    before = len(gateway.log.read_text())
    yield gateway
    gateway.check()
    text = gateway.log.read_text()[before:]
    assert "Traceback" not in text, text
    assert len(text.splitlines()) <= MAX_LINES, text


def knock(address: str, data: bytes, *, reset: bool) -> None:
    """Connect, say `data`, wait for an answer that may not come, and go."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 20) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        connection.settimeout(0.05)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.recv(100)


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_port_scans_other_protocols_and_garbage(target: Target, reset: bool) -> None:
    for data in (
        b"",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /metr",
        b"FOO BAR BAZ QUX\r\n\r\n",
        b"\0\xff" * 1500,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xfe\x01" * 300,
        bytes.fromhex("16030100f1010000ed0303") + bytes(100),  # the beginning of a TLS handshake
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ):
        for address in (target.address, target.metrics_address):
            for _ in range(AGAIN):
                knock(address, data, reset=reset)


def test_clients_of_other_settings(target: Target) -> None:
    for tls in (None, target.stranger):
        if (tls is None) != (target.tls is None):
            for _ in range(AGAIN):
                with SandboxClient(target.address, tls=tls, queue_timeout_s=0.0) as client:
                    assert client.call("echo", "x", timeout_s=5).status == "rejected"


async def test_calls_that_are_cancelled_and_answers_that_nobody_takes(target: Target) -> None:
    for content in ("slow", "x"):
        for wait_s in (0.0, 0.01, 0.3):
            client = AsyncSandboxClient(target.address, tls=target.tls)
            calls = [asyncio.create_task(client.call("echo", content, timeout_s=20)) for _ in range(AGAIN)]
            await asyncio.sleep(wait_s)
            for call in calls:
                call.cancel()
            await client.close()
            await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("content", ["slow", "x"], ids=["they-wait", "they-read"])
def test_clients_that_are_killed(target: Target, content: str) -> None:
    for wait_s in (0.0, 0.05, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, target.address, content, target.tls.model_dump_json() if target.tls else ""],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"asks\n"
        time.sleep(wait_s)
        process.kill()
        process.wait(20)
        process.stdout.close()


def test_a_silent_connection_keeps_nobody_from_the_metrics(target: Target) -> None:
    host, _, port = target.metrics_address.rpartition(":")
    with socket.create_connection((host, int(port)), 20):
        target.check()
