"""The answer to the `stats` call: the figures of one gateway."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PoolState(BaseModel):
    """The present state of the pool of containers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    queue: Count = 0  # calls that wait for a slot
    clients: Count = 0  # connections that wait for a slot or hold one
    slots_free: Count = 0
    slots_taken: Count = 0  # by a call, by an open session, or by the cleaning after one
    sessions: Count = 0  # those that are open
    containers: dict[str, Count] = {}  # by state: serving, spare, starting, retiring


class Stats(BaseModel):
    """Counts since the gateway started, and its present state."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    uptime_s: Seconds
    draining: bool
    running: Count  # calls that wait or run
    calls: dict[str, dict[str, Count]]  # answered: tool → status → how many
    call_seconds: dict[str, dict[str, Seconds]]  # tool → p50, p90, p99, arrival to answer
    queue_seconds: dict[str, dict[str, Seconds]]
    containers_started: Count
    containers_died: Count
    containers_recycled: dict[str, Count]  # by reason: violations, calls, age, unhealthy
    pool: PoolState
