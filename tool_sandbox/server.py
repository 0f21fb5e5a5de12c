"""The gateway: a gRPC server for the tools, which are a pool of containers and, if configured, a search.

It opens what only the user who started it may open (files, the launcher of its containers). Then, if that user is root, it
becomes `nobody`, before it has any client.

`python -m tool_sandbox.server PARENT_PID` is what `local_sandbox` starts. It reads settings as JSON on stdin. It writes one
line of JSON on stdout when it is ready (`{"address": …, "metrics_address": …}`) or has failed (`{"error": …}`). It serves
until SIGTERM or until its parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc
import grpc.aio
import uvloop

from tool_sandbox import privileges, registry, wire
from tool_sandbox.admission import split_deadline
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import AddressError, ContainerEngineError, GatewayError, SandboxError, WireError
from tool_sandbox.metrics import Metrics
from tool_sandbox.second_look import SHORT_GRACE_S, second_look
from tool_sandbox.tls import server_credentials
from tool_sandbox.unread import Unread
from trajectory.types import ToolResult

logger = logging.getLogger(__name__)

SEND_S = 2.0
"""Time to send the last answers after the tools have stopped, seconds."""
PARENT_CHECK_S = 1.0
READ_S = 10.0
"""Longest wait for a request's bytes after its headers came, seconds; a client that is slower is disconnected."""
RETRY_DRAINING_S = 5.0
RETRY_UNREAD_S = 1.0
MIN_PING_S = 4.0
"""Shortest time between a client's pings, seconds (`client.SILENCE_S`). gRPC's default is five minutes, and it disconnects a
client that pings more often."""

_OPTIONS = [
    ("grpc.max_receive_message_length", wire.MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", wire.MAX_REPLY_BYTES),
    ("grpc.so_reuseport", 0),  # a second gateway on the same port is a mistake and must fail
    ("grpc.max_concurrent_streams", 4096),  # for each connection; further calls wait on the client's side
    # For all connections: beyond gRPC's own limit of 1000 it would cancel calls at random. `max_queue` refuses them instead.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    ("grpc.max_metadata_size", 8192),
    ("grpc.server_handshake_timeout_ms", 10_000),  # for a connection that sends nothing
    ("grpc.keepalive_time_ms", 60_000),  # for a client that vanished without closing its connection
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", int(MIN_PING_S * 1000)),
]


class Gateway:
    """Serves one set of tools. `open`; then, in one event loop, `start`, which sets `address`, and `stop`."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._metrics = Metrics()
        self._tools = registry.build_tools(config, self._metrics)
        self._credentials: grpc.ServerCredentials | None = None
        self._handlers: grpc.GenericRpcHandler | None = None
        self._server: grpc.aio.Server | None = None
        self._draining = False
        self._unread = Unread()
        self._idle = asyncio.Event()
        self._idle.set()
        self.address = ""
        self.metrics_address = ""

    def open(self) -> None:
        """Do what only the user who started the gateway may do. Errors: SandboxError, which says what to do."""
        if self._config.tls is not None:
            self._credentials = server_credentials(self._config.tls)
        for name in sorted(self._tools):
            self._tools[name].open()
        if self._config.metrics_address:
            self.metrics_address = self._metrics.serve(self._config)
        # One request for each call, read as a stream, so that it has our deadline. Done here, as gRPC imports more for it.
        handlers = {
            wire.CALL: grpc.stream_unary_rpc_method_handler(self._call),
            wire.STATS: grpc.stream_unary_rpc_method_handler(self._stats),
        }
        self._handlers = grpc.method_handlers_generic_handler(wire.SERVICE, handlers)

    @property
    def broken(self) -> str:
        """Why a tool can't work any more; empty as long as all can."""
        return next((tool.broken for tool in self._tools.values() if tool.broken), "")

    async def start(self) -> None:
        """Listen, then start the tools. Errors: SandboxError, which says what to do."""
        self._server = grpc.aio.server(options=_OPTIONS)
        assert self._handlers is not None, "open() first"
        self._server.add_generic_rpc_handlers((self._handlers,))
        host, _, _ = self._config.address.rpartition(":")
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(self._config.address)
            else:
                port = self._server.add_secure_port(self._config.address, self._credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise AddressError(
                f"sandbox.address: can't listen on {self._config.address}, the port is in use or not ours; choose another, "
                "or port 0 for a free one"
            )
        # Tools that fail quickly start first: without its search index, a gateway needs no containers.
        for name in sorted(self._tools, reverse=True):
            await self._tools[name].start()
        await self._server.start()
        self.address = f"{host}:{port}"

    async def stop(self) -> None:
        """Refuse new calls, let the accepted ones run for `drain_s`, then answer the rest and end."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with second_look(self._config.drain_s, SHORT_GRACE_S):
                await self._idle.wait()
        # Both at once: running and waiting calls are answered, and gRPC has time to send the answers.
        stops = [self._server.stop(SEND_S)] if self._server is not None else []
        await asyncio.gather(*stops, *(tool.close() for tool in self._tools.values()))

    async def _call(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        """Run one tool call. If it is cancelled or the client is lost, this coroutine is cancelled and the code killed."""
        started = time.monotonic()
        await self._admit(context)
        data = await self._read(requests, context)
        self._metrics.num_running += 1
        self._idle.clear()
        try:
            name, result = await self._answer(data, context)
            # Checked again: the client may have stopped reading since.
            if refusal := self._refuse_unread(context.peer()):
                result = replace(refusal, duration_s=result.duration_s, queue_s=result.queue_s)
            self._metrics.answered(name, result, time.monotonic() - started)
            answer = wire.encode_result(result)
            self._count_unread(context, len(answer))
            return answer
        finally:
            self._metrics.num_running -= 1
            if self._metrics.num_running == 0:
                self._idle.set()

    async def _answer(self, data: bytes, context: grpc.aio.ServicerContext) -> tuple[str, ToolResult]:
        """The tool's name, or `unknown`, and the result."""
        try:
            request = wire.decode_request(data)
        except WireError as error:
            return "unknown", ToolResult(status="rejected", message=str(error))
        name = request.tool if request.tool in self._tools else "unknown"
        if refusal := self._refuse(request):
            return name, ToolResult(status="rejected", message=refusal)
        if self._draining:
            message = "the gateway is stopping"
            return name, ToolResult(status="unavailable", message=message, retry_after_s=RETRY_DRAINING_S)
        if unread := self._refuse_unread(context.peer()):
            return name, unread
        queue_s, timeout_s = split_deadline(context.time_remaining(), request.timeout_s, self._config.queue_timeout_s)
        result = await self._tools[name].run(
            request.content,
            timeout_s=timeout_s,
            queue_s=queue_s,
            session_id=request.session_id,
            client=context.peer(),
        )
        return name, result

    def _refuse_unread(self, connection: str) -> ToolResult | None:
        """The answer for a connection that reads its answers too slowly or not at all; None if it reads them."""
        if not (message := self._unread.refusal(connection)):
            return None
        return ToolResult(status="unavailable", message=message, retry_after_s=RETRY_UNREAD_S)

    def _count_unread(self, context: grpc.aio.ServicerContext, size: int) -> None:
        """Count `size` bytes as unread until gRPC says that they were sent, or never will be."""
        connection = context.peer()
        self._unread.add(connection, size)
        context.add_done_callback(lambda _: self._unread.remove(connection, size))

    async def _stats(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        await self._admit(context)
        await self._read(requests, context)
        return wire.encode_stats(self._metrics.stats(draining=self._draining))

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        """Abort the call if its token is wrong, before any of it is read."""
        if self._config.token:
            sent = dict(context.invocation_metadata() or ()).get(wire.TOKEN_KEY, "")
            if not hmac.compare_digest(str(sent).encode(), self._config.token.encode()):
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token")

    async def _read(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        """The request's bytes. Aborts the call if they don't come in time."""
        try:
            async with second_look(READ_S):
                async for data in requests:
                    return data
        except TimeoutError:
            message = f"waited {READ_S:.0f} s on the client for its request"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, message)
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the client sent no request")
        raise AssertionError("abort raises")

    def _refuse(self, request: wire.CallRequest) -> str:
        """Why a well-formed request isn't run; empty if it is run."""
        config = self._config
        if request.tool not in self._tools:
            return f"no tool named {request.tool!r} here; there is {', '.join(sorted(self._tools))}"
        if request.timeout_s > config.max_timeout_s:
            return f"timeout_s={request.timeout_s:g} exceeds sandbox.max_timeout_s={config.max_timeout_s:g}"
        size = len(request.content.encode("utf-8", "surrogatepass"))
        if size > config.max_content_bytes:
            return f"{size} bytes of content exceed sandbox.max_content_bytes={config.max_content_bytes}"
        return ""


def _concerns_us(record: logging.LogRecord) -> bool:
    """Filter of gRPC's logger: it logs, with a traceback, every answer whose client vanished while it was sent."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != "ExecuteBatchError"


def _serve(config: SandboxConfig, announce: Callable[[Gateway], None], parent: int | None) -> None:
    """Serve until a signal, until `parent` ends, or until a tool can't work any more. Errors: SandboxError."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_concerns_us)
    gateway = Gateway(config)
    gateway.open()
    try:
        dropped = privileges.drop()
    except OSError as error:
        raise GatewayError(
            f"sandbox: the gateway can't give up its privileges: {error}; start it on a kernel with seccomp, and as a user "
            "that may change its user id, or as one that isn't root"
        ) from None
    if not dropped:
        logger.info("not started as root: the gateway keeps its user and groups (docs/security.md)")
    uvloop.run(_serve_as_nobody(gateway, announce, parent))


async def _serve_as_nobody(gateway: Gateway, announce: Callable[[Gateway], None], parent: int | None) -> None:
    stop = asyncio.Event()
    serving, broken = False, ""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    async def told_to_stop() -> None:
        while not stop.is_set() and not (serving and gateway.broken) and (parent is None or os.getppid() == parent):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), PARENT_CHECK_S)

    starting, stopping = asyncio.create_task(gateway.start()), asyncio.create_task(told_to_stop())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            serving = True
            announce(gateway)
            await stopping
            broken = "" if stop.is_set() else gateway.broken
    finally:
        starting.cancel()
        await asyncio.wait({starting})
        await gateway.stop()
    if broken:
        logger.error("the gateway ends because its launcher ended: %s", broken)
        raise ContainerEngineError(f"sandbox: the gateway ended because its launcher ended ({broken}); start it again")


def run(config: SandboxConfig) -> None:
    """Serve in the foreground until SIGINT or SIGTERM. Errors: SandboxError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    def announce(gateway: Gateway) -> None:
        metrics = f", metrics on {gateway.metrics_address}" if gateway.metrics_address else ""
        print(f"sandbox gateway on {gateway.address}{metrics}", flush=True)

    _serve(config, announce, parent=None)


def main() -> int:
    """The child process of `local_sandbox`."""
    parent = int(sys.argv[1])
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s sandbox gateway: %(message)s")
    config = SandboxConfig.model_validate_json(sys.stdin.read())

    def announce(gateway: Gateway) -> None:
        print(json.dumps({"address": gateway.address, "metrics_address": gateway.metrics_address}), flush=True)

    try:
        _serve(config, announce, parent)
    except SandboxError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
