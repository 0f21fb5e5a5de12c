"""Clients of the tool sandbox, sync and async. A failed call is a `ToolResult`, never an exception.

Three limits bound a call, each shorter than the next: the code's own `timeout_s`, kept by SIGKILL in the container; the same
plus the wait for a slot, at most `queue_timeout_s`; and the gRPC deadline, which adds a margin for the way there and back.
A gateway that vanishes or hangs is noticed earlier, after `SILENCE_S + SIGN_OF_LIFE_S`; `failover` then uses another one.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from tool_sandbox import wire
from tool_sandbox.config import TlsFiles
from tool_sandbox.errors import GatewayError, RefusedError, WireError
from tool_sandbox.stats import Stats
from tool_sandbox.tls import channel_credentials, mismatch, must_look
from trajectory.types import ToolResult

QUEUE_TIMEOUT_S = 30.0
MARGIN_S = 5.0
"""Added to execution and queueing: time for connecting, for the kill, and for a large reply when the machine is busy."""

MAX_DETAILS_CHARS = 2000
"""Longest error text of gRPC or the gateway that is kept, characters."""

SILENCE_S, SIGN_OF_LIFE_S = 5.0, 10.0
"""While a call is running: the silence after which the gateway is pinged, and the time it has to answer, seconds. gRPC's own
threads answer, even when the gateway is busy. The server must allow pings this often (`server.MIN_PING_S`)."""

_OPTIONS = [
    ("grpc.max_send_message_length", wire.MAX_REQUEST_BYTES),
    ("grpc.max_receive_message_length", wire.MAX_REPLY_BYTES),
    # A gateway that comes back is found again within seconds; gRPC's default is up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.min_reconnect_backoff_ms", int(SILENCE_S * 1000)),  # despite its name: the longest wait for one connection
    ("grpc.keepalive_time_ms", int(SILENCE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(SIGN_OF_LIFE_S * 1000)),
    # gRPC 1.85 waits this long for a ping's answer, whatever `keepalive_timeout_ms` says.
    ("grpc.http2.ping_timeout_ms", int(SIGN_OF_LIFE_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),  # 0 is no limit: a call that computes sends no data
]


class AsyncSandboxClient:
    """Calls tools of the gateway at `address`. Make it and use it inside one event loop."""

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        tls: TlsFiles | None = None,
        queue_timeout_s: float = QUEUE_TIMEOUT_S,
    ) -> None:
        """It connects with the first call. TlsError if the files of `tls` can't be used."""
        self.address = address
        self._metadata, self._tls = _metadata(token), tls
        self._queue_timeout_s = queue_timeout_s
        self._channel = _channel(grpc.aio, address, tls)
        self._call = self._channel.unary_unary(wire.CALL_PATH)

    async def call(
        self, tool: str, content: str, *, timeout_s: float = 5.0, session_id: str | None = None
    ) -> ToolResult:
        """Run `content` with `tool`, `timeout_s` seconds at most. Cancelling the call kills the code."""
        deadline_s = timeout_s + self._queue_timeout_s + MARGIN_S
        try:
            request = wire.encode_request(
                wire.CallRequest(tool=tool, content=content, timeout_s=timeout_s, session_id=session_id)
            )
            return await self.ask(request, deadline_s)
        except (WireError, grpc.RpcError) as error:
            return await self.failed(error, deadline_s)

    async def ask(self, request: bytes, deadline_s: float) -> ToolResult:
        """Send an encoded `CallRequest` and return the answer. Raises grpc.RpcError if none came, WireError if it can't be
        decoded."""
        return wire.decode_result(await self._call(request, timeout=deadline_s, metadata=self._metadata))

    async def failed(self, error: WireError | grpc.RpcError, deadline_s: float) -> ToolResult:
        """The result to return when `ask` raised `error`."""
        if isinstance(error, grpc.RpcError) and must_look(str(error.details())):
            return await asyncio.to_thread(_failed, error, self.address, self._tls, deadline_s)
        return _failed(error, self.address, self._tls, deadline_s)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncSandboxClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class SandboxClient:
    """Calls tools of the gateway at `address`; safe to share between threads."""

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        tls: TlsFiles | None = None,
        queue_timeout_s: float = QUEUE_TIMEOUT_S,
    ) -> None:
        """It connects with the first call. TlsError if the files of `tls` can't be used."""
        self.address = address
        self._metadata, self._tls = _metadata(token), tls
        self._queue_timeout_s = queue_timeout_s
        self._channel = _channel(grpc, address, tls)
        self._call = self._channel.unary_unary(wire.CALL_PATH)
        self._stats = self._channel.unary_unary(wire.STATS_PATH)

    def call(self, tool: str, content: str, *, timeout_s: float = 5.0, session_id: str | None = None) -> ToolResult:
        """Run `content` with `tool`, `timeout_s` seconds at most."""
        deadline_s = timeout_s + self._queue_timeout_s + MARGIN_S
        try:
            request = wire.encode_request(
                wire.CallRequest(tool=tool, content=content, timeout_s=timeout_s, session_id=session_id)
            )
            reply = self._call(request, timeout=deadline_s, metadata=self._metadata)
            return wire.decode_result(reply)
        except (WireError, grpc.RpcError) as error:
            return _failed(error, self.address, self._tls, deadline_s)

    def stats(self, timeout_s: float = MARGIN_S) -> Stats:
        """The gateway's figures. GatewayError if it doesn't answer; RefusedError if it will never answer this client."""
        try:
            return wire.decode_stats(self._stats(b"", timeout=timeout_s, metadata=self._metadata))
        except (WireError, grpc.RpcError) as error:
            result = _failed(error, self.address, self._tls, timeout_s)
            kind = RefusedError if result.status == "rejected" else GatewayError
            raise kind(result.message) from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> SandboxClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return ((wire.TOKEN_KEY, token),) if token else ()


def _channel(api: Any, address: str, tls: TlsFiles | None) -> Any:
    """A channel of `api`: grpc or grpc.aio. It connects with the first call."""
    if tls is None:
        return api.insecure_channel(address, options=_OPTIONS)
    name = [("grpc.ssl_target_name_override", tls.name), ("grpc.default_authority", tls.name)] if tls.name else []
    return api.secure_channel(address, channel_credentials(tls), options=[*_OPTIONS, *name])


def _failed(error: WireError | grpc.RpcError, address: str, tls: TlsFiles | None, deadline_s: float) -> ToolResult:
    """The result of a call for which the gateway gave none. It may open one connection: `tls.must_look`."""
    if isinstance(error, WireError):
        return ToolResult(status="rejected", message=f"call to sandbox gateway {address}: {error}")
    code = error.code()
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return ToolResult(status="rejected", message=f"sandbox gateway {address} refused the token")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = f"client waited {deadline_s:.1f} s on sandbox gateway {address}, which didn't answer"
        return ToolResult(status="unavailable", message=message)
    details = str(error.details())[:MAX_DETAILS_CHARS]
    message = f"sandbox gateway {address}: {code.name}: {details}"
    if never := mismatch(address, tls, details):
        return ToolResult(status="rejected", message=never)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's code for a message that is too long: a retry can't help
        return ToolResult(status="rejected", message=message)
    return ToolResult(status="unavailable", message=message, retry_after_s=1.0)
