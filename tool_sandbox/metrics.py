"""The figures that a gateway counts, for Prometheus and for its `stats` call.

Names start with `autotraj_sandbox_`. Label values never contain a caller's text, so that a hostile tool name can't become a
time series.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tool_sandbox import metrics_http
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import AddressError
from tool_sandbox.stats import PoolState, Stats
from trajectory.types import ToolResult

BUCKETS_S = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120)
QUANTILES = (0.5, 0.9, 0.99)


class Metrics:
    """Counters and histograms of one gateway, in its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._started_at = time.monotonic()
        self._pool: Callable[[], PoolState] | None = None
        self.num_running = 0
        self._calls = self._counter("calls", "Calls answered", "tool", "status")
        self._seconds = self._histogram("call_seconds", "From a call's arrival to its answer")
        self._queue_seconds = self._histogram("queue_seconds", "Waiting for a slot")
        self.started = self._counter("containers_started", "Containers that came into service")
        self.died = self._counter("containers_died", "Containers that died in service")
        self.recycled = self._counter("containers_recycled", "Containers replaced while they worked", "reason")
        gauges: dict[str, tuple[str, Callable[[PoolState], int]]] = {
            "queue_length": ("Calls that wait for a slot", lambda pool: pool.queue),
            "clients": ("Connections that wait for a slot or hold one", lambda pool: pool.clients),
            "slots_free": ("Slots that a call may take now", lambda pool: pool.slots_free),
            "slots_taken": ("Slots with a call, an open session, or being cleaned", lambda pool: pool.slots_taken),
            "sessions": ("Open sessions", lambda pool: pool.sessions),
        }
        for name, (text, value) in gauges.items():
            self._gauge(name, text).set_function(lambda value=value: value(self._state()))  # type: ignore[misc]
        containers = Gauge("autotraj_sandbox_containers", "Containers", ["state"], registry=self.registry)
        for state in ("serving", "spare", "starting", "retiring"):
            containers.labels(state=state).set_function(
                lambda state=state: self._state().containers.get(state, 0)  # type: ignore[misc]
            )
        self._gauge("calls_running", "Calls that wait or run").set_function(lambda: self.num_running)

    def watch(self, pool: Callable[[], PoolState]) -> None:
        """Set the function from which the gauges get their values."""
        self._pool = pool

    def answered(self, tool: str, result: ToolResult, seconds: float) -> None:
        """Count one answered call. `tool` is a registered name, or `unknown`."""
        self._calls.labels(tool=tool, status=result.status).inc()
        self._seconds.labels(tool=tool).observe(seconds)
        self._queue_seconds.labels(tool=tool).observe(result.queue_s)

    def serve(self, config: SandboxConfig) -> str:
        """Serve Prometheus at `config.metrics_address`, from a thread that ends with the process; returns `host:port`."""
        host, _, port = config.metrics_address.rpartition(":")
        try:
            listens = metrics_http.serve(host.strip("[]"), int(port), self.registry, config.tls)
        except OSError as error:
            raise AddressError(
                f"sandbox.metrics_address: can't listen on {config.metrics_address} ({error}); choose another port, or 0"
            ) from None
        return f"{host}:{listens}"

    def stats(self, *, draining: bool) -> Stats:
        """The answer to the `stats` call."""
        calls: dict[str, dict[str, int]] = {}
        for sample in _samples(self._calls, "_total"):
            calls.setdefault(sample[0]["tool"], {})[sample[0]["status"]] = int(sample[1])
        return Stats(
            uptime_s=time.monotonic() - self._started_at,
            draining=draining,
            running=self.num_running,
            calls=calls,
            call_seconds={tool: _quantiles(self._seconds, tool) for tool in calls},
            queue_seconds={tool: _quantiles(self._queue_seconds, tool) for tool in calls},
            containers_started=int(sum(value for _, value in _samples(self.started, "_total"))),
            containers_died=int(sum(value for _, value in _samples(self.died, "_total"))),
            containers_recycled={labels["reason"]: int(value) for labels, value in _samples(self.recycled, "_total")},
            pool=self._state(),
        )

    def _state(self) -> PoolState:
        return self._pool() if self._pool is not None else PoolState()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"autotraj_sandbox_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"autotraj_sandbox_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"autotraj_sandbox_{name}", text, ["tool"], buckets=BUCKETS_S, registry=self.registry)


def quantile(cumulative: list[tuple[float, float]], q: float) -> float:
    """The q-quantile of a histogram given as (upper bound, observations up to it), linear within a bucket; 0 if empty.

    What lies beyond the last finite bound counts as that bound."""
    total = cumulative[-1][1] if cumulative else 0.0
    rank = q * total
    if total == 0:
        return 0.0
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *cumulative]):
        if upto >= rank and upto > below:
            return low if high == float("inf") else low + (high - low) * (rank - below) / (upto - below)
    return cumulative[-1][0]


def _quantiles(histogram: Histogram, tool: str) -> dict[str, float]:
    buckets = [
        (float(labels["le"]), value) for labels, value in _samples(histogram, "_bucket") if labels["tool"] == tool
    ]
    return {f"p{q * 100:g}": quantile(buckets, q) for q in QUANTILES}


def _samples(metric: Counter | Histogram, suffix: str) -> list[tuple[dict[str, str], float]]:
    return [
        (sample.labels, sample.value)
        for family in metric.collect()
        for sample in family.samples
        if sample.name.endswith(suffix)
    ]
