"""Hostile clients against a real gateway: it stays, answers others, and keeps nothing of them."""

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgpack
import psutil
import pytest
from own_gateways import StartGateway

from tool_sandbox import server, wire
from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import GatewayError
from tool_sandbox.local import ROOT, LocalGateway
from trajectory.types import ToolResult

pytestmark = pytest.mark.docker

GOOD = {"tool": "python", "content": "print(1)", "timeout_s": 20.0, "session_id": None}


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@pytest.fixture(scope="module")
def target() -> Iterator[LocalGateway]:
    config = SandboxConfig(
        num_containers=1, num_spares=0, slots_per_container=2, memory_mib=256, scratch_mib=16, token="t"
    )
    with LocalGateway(config) as gateway:
        yield gateway


def alive(gateway: LocalGateway) -> None:
    with SandboxClient(gateway.address, token="t") as client:
        result = client.call("python", "print('alive')", timeout_s=20)
    assert (result.status, result.output) == ("ok", "alive\n"), result.message


def test_pickles_frames_and_broken_msgpack_are_rejected_and_nothing_of_them_runs(
    target: LocalGateway, tmp_path: Path
) -> None:
    bomb = tmp_path / "exploded"
    good = msgpack.packb(GOOD)
    payloads = [pickle.dumps(Bomb(bomb), protocol) for protocol in (0, 2, 5)]
    payloads += [good[:length] for length in range(len(good))]  # truncated everywhere
    payloads += [
        good + b"\0",
        msgpack.packb({**GOOD, "content": pickle.dumps(Bomb(bomb))}),
        b"\x00\x00\x00\x10" + b'{"op":"result"}',  # a frame of the runner's protocol
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
        b"\xc6\xff\xff\xff\xff",  # four gigabytes of bytes
        b"\x91" * 100_000,  # nested a hundred thousand deep
        b"\xc7\x04\x01eval",  # an extension type
    ]
    with grpc.insecure_channel(target.address) as channel:
        call = channel.unary_unary(wire.CALL_PATH)
        for data in payloads:
            reply = wire.decode_result(call(data, timeout=60, metadata=((wire.TOKEN_KEY, "t"),)))
            assert reply.status == "rejected", data[:50]
    assert not bomb.exists()
    alive(target)


def test_oversized_requests_and_metadata_are_refused(target: LocalGateway) -> None:
    with grpc.insecure_channel(target.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_unary(wire.CALL_PATH)
        for data, metadata in (
            (bytes(wire.MAX_REQUEST_BYTES + 1), ((wire.TOKEN_KEY, "t"),)),
            (msgpack.packb(GOOD), ((wire.TOKEN_KEY, "t" * 100_000),)),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                call(data, timeout=60, metadata=metadata)
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    alive(target)


def test_a_stranger_learns_nothing_from_stats(target: LocalGateway) -> None:
    with (
        SandboxClient(target.address, token="wrong") as stranger,
        pytest.raises(GatewayError, match="refused the token"),
    ):
        stranger.stats()
    with SandboxClient(target.address, token="t") as client:
        stats = client.stats()
    assert stats.pool.containers["serving"] == 1
    assert "t" not in stats.calls


def test_connections_that_dribble_do_not_hold_up_others(target: LocalGateway) -> None:
    """Two hundred that say nothing, half of a preface, or a frame that never ends."""
    host, _, port = target.address.rpartition(":")
    beginnings = (b"", b"PRI * HT", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x7f\x01", b"\x16\x03\x01")
    crawlers = [socket.create_connection((host, int(port)), 20) for _ in range(200)]
    try:
        for number, crawler in enumerate(crawlers):
            crawler.sendall(beginnings[number % len(beginnings)])
        alive(target)
    finally:
        for crawler in crawlers:
            crawler.close()
    alive(target)


async def test_a_request_that_never_comes_has_a_deadline_of_ours(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow loris of gRPC: headers, and then no message; it is hung up on, and told why."""
    monkeypatch.setattr(server, "READ_S", 0.3)
    gateway = await start_gateway()
    silence = asyncio.Event()

    async def nothing() -> Any:
        await silence.wait()
        yield b""

    async with grpc.aio.insecure_channel(gateway.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.stream_unary(wire.CALL_PATH)(nothing(), timeout=60)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "on the client for its request" in str(raised.value.details())
    silence.set()


async def test_clients_that_vanish_leave_no_call_and_no_descriptor(target: LocalGateway) -> None:
    process = psutil.Process(target.pid)
    before = process.num_fds()
    for _ in range(10):
        client = AsyncSandboxClient(target.address, token="t")
        calls = [asyncio.create_task(client.call("python", "while True: pass", timeout_s=50)) for _ in range(4)]
        await asyncio.sleep(0.02)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
    async with asyncio.timeout(60), AsyncSandboxClient(target.address, token="t") as client:
        assert (await client.call("python", "print(1)", timeout_s=20)).output == "1\n"
        while process.num_fds() > before + 4:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def test_many_forgotten_sessions_hold_no_more_than_the_slots(target: LocalGateway) -> None:
    """As in test_recycling with ten thousand, here with real containers."""
    with SandboxClient(target.address, token="t") as client:
        for number in range(60):
            result = client.call("python", "x = 1", timeout_s=20, session_id=f"forgotten-{number}")
            assert (result.status, result.fresh) == ("ok", True), result.message
        assert client.stats().pool.sessions <= 2
        again = client.call("python", "print('x' in globals())", timeout_s=20, session_id="forgotten-0")
    assert (again.output, again.fresh) == ("False\n", True)
    alive(target)


def test_a_short_deadline_of_the_client_ends_the_code_before_it(target: LocalGateway) -> None:
    request = wire.encode_request(wire.CallRequest(tool="python", content="print('in')\nwhile 1: pass", timeout_s=50))
    with grpc.insecure_channel(target.address) as channel:
        call = channel.unary_unary(wire.CALL_PATH)
        for _ in range(
            3
        ):  # a slot of an earlier test may still be cleaned: waiting for it gets a tenth of the deadline
            reply = wire.decode_result(call(request, timeout=8, metadata=((wire.TOKEN_KEY, "t"),)))
            if reply.status != "unavailable":
                break
    assert (reply.status, reply.output) == ("timeout", "in\nIt was at line 2: while 1: pass\n")


def test_a_gateway_told_to_stop_lets_calls_end_and_refuses_new_ones() -> None:
    config = SandboxConfig(num_containers=1, slots_per_container=2, memory_mib=256, drain_s=30)
    with LocalGateway(config) as gateway, SandboxClient(gateway.address) as client:
        code = "import time; time.sleep(3); print('done')"
        command = [
            sys.executable,
            "-c",
            f"""
from tool_sandbox.client import SandboxClient
with SandboxClient({gateway.address!r}) as client:
    print(client.call("python", {code!r}, timeout_s=20).output, end="")
""",
        ]
        running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while client.stats().running == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(gateway.pid, signal.SIGTERM)
        late: ToolResult | None = None
        while running.poll() is None and (late is None or late.status == "ok"):
            late = client.call("python", "print(1)", timeout_s=5)
        output, _ = running.communicate(timeout=60)
    assert output == "done\n"
    assert late is not None
    assert late.status == "unavailable"
