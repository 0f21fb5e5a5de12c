"""Tool calls that take as long as real ones do: a rollout actor that waits before it calls the sandbox."""

from __future__ import annotations

import asyncio
import random

MEDIAN_S, SIGMA, LONGEST_S = 0.5, 1.0, 5.0
"""Log-normal: median 0.5 s, one call in a hundred over 5 s, cut there."""


def draw(rng: random.Random) -> float:
    """One call's latency, seconds."""
    return min(MEDIAN_S * rng.lognormvariate(0.0, SIGMA), LONGEST_S)


async def wait(rng: random.Random) -> None:
    await asyncio.sleep(draw(rng))
