"""Requests and results survive the trip; whatever isn't one is refused by name, and never crashes the gateway."""

import random

import msgpack
import pytest

from tool_sandbox import wire
from tool_sandbox.errors import WireError
from tool_sandbox.stats import PoolState, Stats
from trajectory.types import ToolResult

GOOD = {"tool": "python", "content": "print(1)", "timeout_s": 2.5, "session_id": None}


@pytest.mark.parametrize("session_id", [None, "a/1"])
def test_a_request_survives_the_trip(session_id: str | None) -> None:
    request = wire.CallRequest(tool="python", content="print('ü\0')", timeout_s=2.5, session_id=session_id)
    assert wire.decode_request(wire.encode_request(request)) == request


def test_a_result_survives_the_trip() -> None:
    result = ToolResult(
        status="timeout", output="½\ufffd", message="m", duration_s=0.5, queue_s=0.25, fresh=False, retry_after_s=1.0
    )
    assert wire.decode_result(wire.encode_result(result)) == result


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tool": 3}, "tool must"),
        ({"tool": "x" * 101}, "tool must"),
        ({"content": b"bytes"}, "content must"),
        ({"content": None}, "content must"),
        ({"timeout_s": "5"}, "timeout_s must"),
        ({"timeout_s": 0}, "timeout_s must"),
        ({"timeout_s": True}, "timeout_s must"),
        ({"timeout_s": float("nan")}, "timeout_s must"),
        ({"timeout_s": float("inf")}, "timeout_s must"),
        ({"session_id": ""}, "session_id must"),
        ({"session_id": "x" * 201}, "session_id must"),
        ({"session_id": 7}, "session_id must"),
        ({"uid": 0}, "unknown fields: uid"),
    ],
)
def test_each_field_is_checked(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        wire.decode_request(msgpack.packb({**GOOD, **change}))


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x01", msgpack.packb([1]), b"\x81" * 100_000, b"\xdf\xff\xff\xff\xff"]
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_request(data)


def test_what_cannot_be_sent_is_refused_before_it_is() -> None:
    with pytest.raises(WireError, match="at most"):
        wire.encode_request(wire.CallRequest(tool="python", content="x" * wire.MAX_REQUEST_BYTES, timeout_s=1))
    with pytest.raises(WireError, match="can't be encoded"):
        wire.encode_request(wire.CallRequest(tool="python", content="\ud800", timeout_s=1))


def test_a_result_of_another_version_is_refused() -> None:
    with pytest.raises(WireError, match="unknown status 'fine'"):
        wire.decode_result(msgpack.packb({"status": "fine"}))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"status": ["ok"]}, "unknown status"),
        ({"output": None}, "output must be a string"),
        ({"output": b"bytes"}, "output must be a string"),
        ({"message": 3}, "message must be a string"),
        ({"duration_s": "fast"}, "duration_s must"),
        ({"duration_s": float("nan")}, "duration_s must"),
        ({"duration_s": True}, "duration_s must"),
        ({"queue_s": -1.0}, "queue_s must"),
        ({"queue_s": float("inf")}, "queue_s must"),
        ({"fresh": 1}, "fresh must"),
        ({"retry_after_s": -0.5}, "retry_after_s must"),
        ({"retry_after_s": 1e9}, "retry_after_s must"),
    ],
)
def test_each_field_of_a_result_is_checked(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        wire.decode_result(msgpack.packb({"status": "ok", **change}))


STATS = Stats(
    uptime_s=3.0,
    draining=False,
    running=1,
    calls={"python": {"ok": 2}},
    call_seconds={"python": {"p50": 0.1}},
    queue_seconds={},
    containers_started=1,
    containers_died=0,
    containers_recycled={},
    pool=PoolState(containers={"serving": 1}),
)


def test_stats_survive_the_trip() -> None:
    assert wire.decode_stats(wire.encode_stats(STATS)) == STATS


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"uptime_s": "3"}, "uptime_s"),
        ({"uptime_s": float("inf")}, "uptime_s"),
        ({"draining": "no"}, "draining"),
        ({"running": -1}, "running"),
        ({"calls": {"python": {"ok": "2"}}}, "calls.python.ok"),
        ({"call_seconds": {"python": {"p50": float("nan")}}}, "call_seconds.python.p50"),
        ({"pool": {"queue": -1}}, "pool.queue"),
    ],
)
def test_each_field_of_stats_is_checked(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(WireError, match=f"no stats: {complaint}"):
        wire.decode_stats(msgpack.packb({**STATS.model_dump(), **change}))


def test_garbage_is_a_request_or_a_wire_error() -> None:
    rng = random.Random(0)
    good = msgpack.packb(GOOD)
    num_refused = 0
    for _ in range(3000):
        data = bytearray(good) if rng.random() < 0.7 else bytearray(rng.randbytes(rng.randrange(40)))
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert 0 < wire.decode_request(bytes(data[: rng.randrange(1, 99)])).timeout_s < float("inf")
        except WireError:
            num_refused += 1
    assert 1000 < num_refused < 3000
