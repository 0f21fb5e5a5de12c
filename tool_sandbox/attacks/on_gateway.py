"""Attacks of a hostile client on the gateway from outside. The same must hold as for an attack from inside (attack.py):
the neighbour, who is another client, gets right answers all the while, and the next calls find everything unchanged.

An attack returns what it achieved, a line for each success; nothing if it achieved nothing.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgpack

from tool_sandbox import wire
from tool_sandbox.client import AsyncSandboxClient

CALL_TIMEOUT_S = 60.0
NUM_SESSIONS = 10_000
NUM_CALLS = 3000
"""Calls of the flood, more than the default `max_queue` allows."""
NUM_CONNECTIONS = 200


@dataclass(frozen=True, slots=True)
class Target:
    address: str
    token: str


@dataclass(frozen=True, slots=True)
class ClientAttack:
    """One attack of a client."""

    name: str
    tries: str  # what it tries, for people
    run: Callable[[Target], list[str]]


class Bomb:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def _send(target: Target, messages: list[bytes]) -> Iterator[tuple[bytes, str, str]]:
    """Send each message; yields it with the status and text of its answer. gRPC's own refusals are named as gRPC does."""
    metadata = ((wire.TOKEN_KEY, target.token),) if target.token else ()
    with grpc.insecure_channel(target.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_unary(wire.CALL_PATH)
        for message in messages:
            try:
                reply = wire.decode_result(call(message, timeout=CALL_TIMEOUT_S, metadata=metadata))
                yield message, reply.status, reply.message
            except grpc.RpcError as error:
                yield message, error.code().name, str(error.details())


def _request(content: object = "print(1)", **changes: object) -> bytes:
    request = {"tool": "python", "content": content, "timeout_s": 20.0, "session_id": None}
    packed: bytes = msgpack.packb(request | changes)
    return packed


def pickles_and_frames(target: Target) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        bomb = Path(folder, "exploded")
        pickles = [pickle.dumps(Bomb(bomb), protocol) for protocol in range(6)]
        frame = b'{"op": "result", "id": 0, "slot": 0, "status": "ok", "message": "", "output": "forged"}'
        order = b'{"op": "start"}'
        messages = [*pickles, *map(_request, pickles), len(frame).to_bytes(4, "big") + frame, frame, order]
        found = [
            f"answered {status}: {message[:40]!r}"
            for message, status, _ in _send(target, messages)
            if status != "rejected"
        ]
        return found + ["a pickle was loaded"] * bomb.exists()


def broken_msgpack(target: Target) -> list[str]:
    good = _request()
    messages = [good[:length] for length in range(len(good))]
    messages += [
        good + b"\0",
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
        b"\xc6\xff\xff\xff\xff",  # four gigabytes of bytes
        b"\x91" * 100_000,  # nested a hundred thousand deep
        b"\xc7\x04\x01eval",  # an extension type
        _request(timeout_s=float("nan")),
        _request(timeout_s=-1.0),
        _request(timeout_s=1e300),
        _request(tool="../python"),
        _request(tool=["python"]),
        _request(session_id=""),
        _request(session_id="s" * 10_000),
        _request(content=None),
        _request(content="x" * (1 << 20)),
        _request(command="id"),
    ]
    found = [
        f"answered {status}: {message[:40]!r}" for message, status, _ in _send(target, messages) if status != "rejected"
    ]
    for _, status, _ in _send(target, [bytes(wire.MAX_REQUEST_BYTES + 1), bytes(64 << 20)]):
        if status != "RESOURCE_EXHAUSTED":
            found.append(f"too long a message was answered {status}")
    return found


def strangers(target: Target) -> list[str]:
    """Calls with a wrong token, where the gateway asks for one; and calls of other methods everywhere."""
    found = []
    with grpc.insecure_channel(target.address) as channel:
        tries = [(f"/{wire.SERVICE}/{method}", target.token) for method in ("Shutdown", "__class__", "../Call", "")]
        tries += [("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", target.token)]
        if target.token:
            tries += [
                (path, token)
                for path in (wire.CALL_PATH, wire.STATS_PATH)
                for token in ("", "wrong", target.token + "x")
            ]
        for path, token in tries:
            try:
                channel.unary_unary(path)(_request(), timeout=CALL_TIMEOUT_S, metadata=((wire.TOKEN_KEY, token),))
                found.append(f"{path} answered with token {token!r}")
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED):
                    found.append(f"{path}: {error.code().name}")
    return found


def slow_loris(target: Target) -> list[str]:
    """Raw connections that send nothing or half a request, and gRPC calls whose request never comes."""
    host, _, port = target.address.rpartition(":")
    beginnings = (
        b"",
        b"PRI * HT",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x7f\x01",
        b"\x16\x03\x01",
        b"GET / HTTP/1.1\r\n",
    )
    crawlers = [socket.create_connection((host, int(port)), CALL_TIMEOUT_S) for _ in range(NUM_CONNECTIONS)]
    try:
        for number, crawler in enumerate(crawlers):
            crawler.sendall(beginnings[number % len(beginnings)])
        return asyncio.run(_never_send(target))
    finally:
        for crawler in crawlers:
            crawler.close()


async def _never_send(target: Target) -> list[str]:
    silence = asyncio.Event()

    async def nothing() -> Any:
        await silence.wait()
        yield b""

    metadata = ((wire.TOKEN_KEY, target.token),) if target.token else ()
    async with grpc.aio.insecure_channel(target.address) as channel:
        call = channel.stream_unary(wire.CALL_PATH)
        calls = [call(nothing(), timeout=CALL_TIMEOUT_S, metadata=metadata) for _ in range(NUM_CONNECTIONS)]
        codes = await asyncio.gather(*(one.code() for one in calls))
    silence.set()
    return [f"{len(calls)} silent calls ended {codes}"] if set(codes) != {grpc.StatusCode.DEADLINE_EXCEEDED} else []


def forgotten_sessions(target: Target) -> list[str]:
    async def flood() -> list[str]:
        found: list[str] = []
        numbers = iter(range(NUM_SESSIONS))

        async def opener(client: AsyncSandboxClient) -> None:
            for number in numbers:
                result = await client.call("python", "x = 1", timeout_s=20, session_id=f"forgotten-{number}")
                if (result.status, result.fresh) != ("ok", True):
                    found.append(f"session {number}: {result.status} {result.message}")

        async with AsyncSandboxClient(target.address, token=target.token) as client:
            await asyncio.gather(*(opener(client) for _ in range(8)))
            again = await client.call("python", "print('x' in globals())", timeout_s=20, session_id="forgotten-0")
            if (again.output, again.fresh) != ("False\n", True):
                found.append(f"the first session came back: {again.output!r}, fresh={again.fresh}")
        return found[:5]

    return asyncio.run(flood())


def call_flood(target: Target) -> list[str]:
    """More calls at once than the queue holds: each gets a right answer, or `unavailable` with a time for the next try."""

    async def flood() -> list[str]:
        async with AsyncSandboxClient(target.address, token=target.token) as client:
            calls = (client.call("python", "print(1)", timeout_s=20) for _ in range(NUM_CALLS))
            results = await asyncio.gather(*calls)
        return [
            f"{result.status}: {result.message}"
            for result in results
            if (result.status, result.output) != ("ok", "1\n")
            and (result.status != "unavailable" or result.retry_after_s is None)
        ][:5]

    return asyncio.run(flood())


def vanishing_clients(target: Target) -> list[str]:
    """Start code that never ends, and cut the connection."""

    def one(number: int) -> None:
        with closing(grpc.insecure_channel(target.address)) as channel:
            metadata = ((wire.TOKEN_KEY, target.token),) if target.token else ()
            channel.unary_unary(wire.CALL_PATH).future(
                _request("while True: pass"), timeout=CALL_TIMEOUT_S, metadata=metadata
            )
            time.sleep(0.01 * (number % 10))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(80)))
    return []


CLIENTS = (
    ClientAttack(
        "pickles and frames", "pickles, the runner's frames and the launcher's orders as requests", pickles_and_frames
    ),
    ClientAttack(
        "broken msgpack", "truncated everywhere, oversized, deep, fields that lie; messages too long", broken_msgpack
    ),
    ClientAttack("strangers", "a wrong token, methods that aren't there, reflection", strangers),
    ClientAttack("slow loris", "200 connections and 200 calls that send half a request, or nothing", slow_loris),
    ClientAttack("forgotten sessions", "10,000 sessions opened and never used again", forgotten_sessions),
    ClientAttack("flood of calls", "3,000 calls at once", call_flood),
    ClientAttack("vanishing clients", "80 that start endless code and hang up", vanishing_clients),
)
