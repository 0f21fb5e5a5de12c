"""A rollout actor whose tool calls take as long as real ones: it waits before it calls the sandbox."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from actors.rollout import RolloutActor
from trajectory.types import ToolCall, ToolResult

MEDIAN_S, SIGMA, LONGEST_S = 0.5, 1.0, 5.0
"""Latencies are log-normal: the median is 0.5 s, one call in a hundred would take over 5 s and is cut there."""


def draw(rng: random.Random) -> float:
    """One call's latency, seconds."""
    return min(MEDIAN_S * rng.lognormvariate(0.0, SIGMA), LONGEST_S)


class SlowToolActor(RolloutActor):
    """`RolloutActor` whose every tool call first waits for a drawn latency; the sandbox call itself is real."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rng = random.Random(self.worker_index)

    async def _call_tool(self, call: ToolCall, timeout_s: float) -> ToolResult:
        await asyncio.sleep(draw(self._rng))
        return await super()._call_tool(call, timeout_s)
