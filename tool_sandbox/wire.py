"""The messages between client and gateway: two gRPC methods with msgpack maps, by generic handlers without generated code.

client ── CallRequest ──▶ /autotraj.ToolSandbox/Call  ── trajectory.types.ToolResult ──▶ client
       ── nothing ──────▶ /autotraj.ToolSandbox/Stats ── stats.Stats ──────────────────▶
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

import msgpack
from pydantic import ValidationError

from tool_sandbox.errors import WireError
from tool_sandbox.stats import Stats
from trajectory.types import ToolResult, ToolStatus

SERVICE = "autotraj.ToolSandbox"
CALL = "Call"
CALL_PATH = f"/{SERVICE}/{CALL}"
STATS = "Stats"
STATS_PATH = f"/{SERVICE}/{STATS}"
TOKEN_KEY = "x-autotraj-token"
"""Metadata key under which the shared token is sent."""

MAX_REQUEST_BYTES = 2 * 1024 * 1024
MAX_REPLY_BYTES = 32 * 1024 * 1024
"""gRPC refuses messages above these sizes. A reply may hold 8 MiB of output, at worst 3 bytes a character once decoded."""

MAX_SESSION_ID_CHARS = 200
MAX_TOOL_CHARS = 100

MAX_RESULT_S = 86_400.0
"""Longest time that a result may report, seconds; a day is far above every deadline."""

_STATUSES = frozenset(get_args(ToolStatus))


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRequest:
    """One tool call as the client requests it."""

    tool: str
    content: str
    timeout_s: float  # of execution, without queueing
    session_id: str | None = None  # None: a single call, after which no state is kept


_REQUEST_FIELDS = frozenset(field.name for field in fields(CallRequest))
_RESULT_FIELDS = frozenset(field.name for field in fields(ToolResult))


def encode_request(request: CallRequest) -> bytes:
    """Bytes of `request`. WireError if it can't be sent (lone surrogates, or too long)."""
    return _pack({name: getattr(request, name) for name in _REQUEST_FIELDS}, MAX_REQUEST_BYTES)


def decode_request(data: bytes) -> CallRequest:
    """The request in `data`, with every field checked. WireError says what is wrong with it."""
    message = _unpack(data, _REQUEST_FIELDS)
    tool, content = message.get("tool"), message.get("content")
    timeout_s, session_id = message.get("timeout_s"), message.get("session_id")
    if not isinstance(tool, str) or len(tool) > MAX_TOOL_CHARS:
        raise WireError(f"tool must be a string of at most {MAX_TOOL_CHARS} characters")
    if not isinstance(content, str):
        raise WireError("content must be a string")
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 0 < timeout_s < float("inf"):
        raise WireError("timeout_s must be a positive number of seconds")
    if session_id is not None and not (isinstance(session_id, str) and 0 < len(session_id) <= MAX_SESSION_ID_CHARS):
        raise WireError(f"session_id must be a string of 1 to {MAX_SESSION_ID_CHARS} characters, or absent")
    return CallRequest(tool=tool, content=content, timeout_s=float(timeout_s), session_id=session_id)


def encode_result(result: ToolResult) -> bytes:
    return _pack({name: getattr(result, name) for name in _RESULT_FIELDS}, MAX_REPLY_BYTES)


def decode_result(data: bytes) -> ToolResult:
    """The result in `data`, with every field checked. WireError if it is none (a gateway of another version).

    Only `status` is required; an absent field has `ToolResult`'s default."""
    message = _unpack(data, _RESULT_FIELDS)
    status = message.get("status")
    if not isinstance(status, str) or status not in _STATUSES:
        raise WireError(f"unknown status {status!r:.100}")
    for name in ("output", "message"):
        if not isinstance(message.get(name, ""), str):
            raise WireError(f"{name} must be a string")
    for name in ("duration_s", "queue_s"):
        if not _is_time(message.get(name, 0.0)):
            raise WireError(f"{name} must be a number of seconds from 0 to {MAX_RESULT_S:g}")
    if not isinstance(message.get("fresh", True), bool):
        raise WireError("fresh must be true or false")
    if (retry_after_s := message.get("retry_after_s")) is not None and not _is_time(retry_after_s):
        raise WireError(f"retry_after_s must be a number of seconds from 0 to {MAX_RESULT_S:g}, or absent")
    return ToolResult(**message)


def encode_stats(stats: Stats) -> bytes:
    return _pack(stats.model_dump(), MAX_REPLY_BYTES)


def decode_stats(data: bytes) -> Stats:
    """The stats in `data`. WireError if they are none (a gateway of another version)."""
    try:
        return Stats.model_validate(_unpack(data, frozenset(Stats.model_fields)))
    except ValidationError as error:
        first = error.errors()[0]
        raise WireError(f"no stats: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _is_time(value: object) -> bool:
    """Whether `value` is a time. NaN is none, as it compares false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_RESULT_S


def _pack(message: dict[str, Any], limit: int) -> bytes:
    try:
        data: bytes = msgpack.packb(message)
    except (ValueError, OverflowError) as error:  # UnicodeEncodeError is a subclass of ValueError
        raise WireError(f"can't be encoded: {error}") from error
    if len(data) > limit:
        raise WireError(f"message of {len(data)} bytes; at most {limit} are sent")
    return data


def _unpack(data: bytes, names: frozenset[str]) -> dict[str, Any]:
    try:
        message = msgpack.unpackb(data)  # gRPC bounds the length, which also bounds the sizes that the data announces
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"expected a map, got {type(message).__name__}")
    if unknown := sorted(str(key) for key in message.keys() - names):
        raise WireError(f"unknown fields: {', '.join(unknown)}")
    return message
