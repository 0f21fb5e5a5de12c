"""What a gateway says of itself, in one answer to the `stats` call."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class PoolState(BaseModel):
    """The pool of containers, now."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queue: int = 0  # calls that wait for a slot
    clients: int = 0  # connections that wait for a slot or hold one
    slots_free: int = 0
    slots_taken: int = 0  # by a call, an open session, or the cleaning after one
    sessions: int = 0  # open ones
    containers: dict[str, int] = {}  # by state: serving, spare, starting, retiring


class Stats(BaseModel):
    """Counts since the gateway started, and its state now."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uptime_s: float
    draining: bool
    running: int  # calls that wait or run
    calls: dict[str, dict[str, int]]  # answered: tool → status → how many
    call_seconds: dict[str, dict[str, float]]  # tool → p50, p90, p99, arrival to answer
    queue_seconds: dict[str, dict[str, float]]
    containers_started: int
    containers_died: int
    containers_recycled: dict[str, int]  # by reason: violations, calls, age, unhealthy
    pool: PoolState
