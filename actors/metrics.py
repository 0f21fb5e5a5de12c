"""The metrics of one engine's actor for Prometheus, sent through Ray's agent on its node and named `ray_autotraj_…`."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from actors.engine.protocol import UpdateReport
from trajectory.types import ToolResult

SECONDS = [0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0]
"""Bucket borders, seconds. A warm tool call takes milliseconds; one that hangs takes until its deadline."""

COUNTERS = {
    "generated_tokens": "Tokens sampled",
    "prompt_tokens": "Tokens of prompts and earlier turns given to the engine",
    "cached_prompt_tokens": "Of those, found in the prefix cache",
    "episodes_finished": "Episodes that ended, however they did",
}
GAUGES = {"episodes_in_flight": "Episodes under way", "requests_in_flight": "Requests in the engine"}


class EngineMetrics:
    """The metrics of this process. Make only one in a process, as two would add up."""

    def __init__(self, engine: str) -> None:
        self._engine = {"engine": engine}
        self._counters = {name: Counter(f"autotraj_{name}", text, ("engine",)) for name, text in COUNTERS.items()}
        self._gauges = {name: Gauge(f"autotraj_{name}", text, ("engine",)) for name, text in GAUGES.items()}
        self._counted: dict[str, float] = {}
        self._tool_seconds = Histogram(
            "autotraj_tool_seconds", "A tool call as the episode sees it", SECONDS, ("engine", "tool", "status")
        )
        self._tool_queue_seconds = Histogram(
            "autotraj_tool_queue_seconds", "Of that, waiting for a place in the sandbox", SECONDS, ("engine", "tool")
        )
        self._update_seconds = Histogram(
            "autotraj_engine_update_seconds", "Taking new weights, by phase", SECONDS, ("engine", "phase")
        )

    def stats(self, stats: Mapping[str, float]) -> None:
        """Publish the result of `RolloutActor.stats`: totals since the start, and what is running."""
        for name, counter in self._counters.items():
            if (grown := stats[name] - self._counted.get(name, 0.0)) > 0:
                counter.inc(grown, self._engine)
                self._counted[name] = stats[name]
        for name, gauge in self._gauges.items():
            gauge.set(stats[name], self._engine)

    def tool_call(self, tool: str, result: ToolResult, seconds: float) -> None:
        # The grammar has only a few tags, so `tool` can't be used to fill Prometheus with names.
        self._tool_seconds.observe(seconds, {**self._engine, "tool": tool, "status": result.status})
        self._tool_queue_seconds.observe(result.queue_s, {**self._engine, "tool": tool})

    def weights_taken(self, report: UpdateReport, fetch_s: float) -> None:
        """`fetch_s`: seconds from the object store to this process."""
        for phase, seconds in (("fetch", fetch_s), ("write", report.write_s), ("paused", report.paused_s)):
            self._update_seconds.observe(seconds, {**self._engine, "phase": phase})
