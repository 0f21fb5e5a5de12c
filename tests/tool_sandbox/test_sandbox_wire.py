"""Messages and settings, without a container."""

import msgpack
import pytest

from tool_sandbox import wire
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import WireError
from tool_sandbox.python_tool import zygote_for
from trajectory.types import ToolResult

GOOD = {"tool": "python", "content": "1", "timeout_s": 5.0, "session_id": None}


def test_a_request_survives_the_wire() -> None:
    request = wire.CallRequest(tool="python", content="print('é')", timeout_s=2.5, session_id="s")
    assert wire.decode_request(wire.encode_request(request)) == request


def test_a_result_survives_the_wire() -> None:
    result = ToolResult(status="timeout", output="x", message="m", duration_s=1.5, queue_s=0.5, fresh=False)
    assert wire.decode_result(wire.encode_result(result)) == result


@pytest.mark.parametrize(
    "change",
    [
        {"tool": 1},
        {"tool": "x" * 101},
        {"content": b"bytes"},
        {"content": None},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
        {"timeout_s": True},
        {"timeout_s": "5"},
        {"session_id": ""},
        {"session_id": "x" * 201},
        {"session_id": 7},
        {"extra": 1},
    ],
)
def test_a_malformed_request_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(WireError):
        wire.decode_request(msgpack.packb({**GOOD, **change}))


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x01", msgpack.packb([1]), b"\x81" * 100_000, b"\xdf\xff\xff\xff\xff"]
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_request(data)


def test_what_cannot_be_sent_is_told() -> None:
    with pytest.raises(WireError):
        wire.encode_request(wire.CallRequest(tool="python", content="\ud800", timeout_s=1.0))


def test_an_unknown_status_is_no_result() -> None:
    with pytest.raises(WireError):
        wire.decode_result(msgpack.packb({"status": "fine"}))


@pytest.mark.parametrize("address", ["0.0.0.0:5000", "10.1.2.3:5000", "[::]:5000"])
def test_beyond_loopback_a_token_is_needed(address: str) -> None:
    with pytest.raises(ValueError, match="set tls, set a token"):
        SandboxConfig(address=address)
    assert SandboxConfig(address=address, token="t").address == address


@pytest.mark.parametrize("address", ["5000", "localhost", "127.0.0.1:x", "127.0.0.1:70000"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        SandboxConfig(address=address)


def test_a_token_is_not_shown() -> None:
    assert "s3cret" not in repr(SandboxConfig(token="s3cret"))


@pytest.mark.parametrize(
    ("code", "zygote"),
    [
        ("print(1)", "cold"),
        ("import math", "cold"),
        ("import numpy as np", "warm"),
        ("from sympy.abc import x", "warm"),
        ("import os, scipy.stats", "warm"),
        ("numpyro = 1", "cold"),
    ],
)
def test_which_zygote(code: str, zygote: str) -> None:
    assert zygote_for(code) == zygote
