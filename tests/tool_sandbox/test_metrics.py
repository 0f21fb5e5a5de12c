"""What a gateway counts, what Prometheus reads of it, and quantiles by hand."""

import math
import urllib.request

import msgpack
import pytest
from prometheus_client import generate_latest

from tool_sandbox import wire
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import AddressError, WireError
from tool_sandbox.metrics import Metrics, quantile
from tool_sandbox.stats import PoolState
from trajectory.types import ToolResult

STATE = PoolState(queue=3, clients=2, slots_free=1, slots_taken=7, sessions=4, containers={"serving": 2, "retiring": 1})


def test_a_quantile_is_linear_within_its_bucket() -> None:
    cumulative = [(1.0, 10.0), (2.0, 30.0), (4.0, 40.0), (math.inf, 40.0)]
    assert quantile(cumulative, 0.5) == pytest.approx(1.5)  # the 20th of 40: halfway through the second bucket
    assert quantile(cumulative, 0.125) == pytest.approx(0.5)
    assert quantile(cumulative, 1.0) == pytest.approx(4.0)


def test_a_quantile_of_nothing_is_zero_and_beyond_the_last_bound_it_is_the_bound() -> None:
    assert quantile([(1.0, 0.0), (math.inf, 0.0)], 0.5) == 0.0
    assert quantile([(1.0, 0.0), (math.inf, 5.0)], 0.5) == 1.0


def filled() -> Metrics:
    metrics = Metrics()
    metrics.watch(lambda: STATE)
    for _ in range(3):
        metrics.answered("python", ToolResult(status="ok", queue_s=0.5), 0.008)
    metrics.answered("python", ToolResult(status="timeout"), 2.0)
    metrics.answered("unknown", ToolResult(status="rejected"), 0.001)
    metrics.recycled.labels(reason="age").inc()
    metrics.died.inc()
    return metrics


def test_stats_say_what_was_counted_and_survive_the_wire() -> None:
    stats = wire.decode_stats(wire.encode_stats(filled().stats(draining=True)))
    assert stats.calls == {"python": {"ok": 3, "timeout": 1}, "unknown": {"rejected": 1}}
    assert (stats.containers_died, stats.containers_recycled, stats.draining) == (1, {"age": 1}, True)
    assert stats.pool == STATE
    assert 0.006 < stats.call_seconds["python"]["p50"] <= 0.01
    assert 1.5 < stats.call_seconds["python"]["p99"] <= 3.0


def test_stats_of_another_version_are_refused() -> None:
    for data in (b"", b"\xc1", msgpack.packb({"uptime_s": 1.0}), msgpack.packb({"surprise": 1})):
        with pytest.raises(WireError):
            wire.decode_stats(data)


def test_prometheus_reads_every_series() -> None:
    text = generate_latest(filled().registry).decode()
    for line in (
        'autotraj_sandbox_calls_total{status="ok",tool="python"} 3.0',
        'autotraj_sandbox_call_seconds_bucket{le="0.01",tool="python"} 3.0',
        'autotraj_sandbox_queue_seconds_count{tool="python"} 4.0',
        'autotraj_sandbox_containers{state="retiring"} 1.0',
        'autotraj_sandbox_containers_recycled_total{reason="age"} 1.0',
        "autotraj_sandbox_containers_died_total 1.0",
        "autotraj_sandbox_queue_length 3.0",
        "autotraj_sandbox_slots_taken 7.0",
        "autotraj_sandbox_sessions 4.0",
    ):
        assert line in text.splitlines()


def test_prometheus_asks_over_http_and_a_taken_port_is_told() -> None:
    address = filled().serve(SandboxConfig(metrics_address="127.0.0.1:0"))
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as reply:
        assert b"autotraj_sandbox_queue_length 3.0" in reply.read()
    with pytest.raises(AddressError, match=r"sandbox\.metrics_address"):
        Metrics().serve(SandboxConfig(metrics_address=address))
