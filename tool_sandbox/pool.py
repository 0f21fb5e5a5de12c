"""The containers of a node, and the calls and sessions in them.

    call ──▶ queue (bounded, fair between clients: admission.py) ──▶ a free slot (slots.py) ──▶ container (places.py)
                         ▲                                                   │
                         └──── slot clean again, container replaced, idle session closed

When a container dies, each call in it fails with an explicit status, and its place in the pool is filled again as long as
the pool is open. A session keeps its slot between cells. It loses the slot and its state when it wasn't used for
`session_idle_s`, or when it is idle and another call finds no slot. Its next cell then starts a new session and says so
(`fresh`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tool_sandbox.config import SandboxConfig
from tool_sandbox.container import Container, Reply
from tool_sandbox.errors import RunnerError
from tool_sandbox.launcher import Launcher
from tool_sandbox.metrics import Metrics
from tool_sandbox.places import Places
from tool_sandbox.second_look import SHORT_GRACE_S, second_look
from tool_sandbox.slots import NoSlotError, Slot, Slots
from tool_sandbox.stats import PoolState
from trajectory.types import ToolResult, ToolStatus

SWEEP_S = 1.0
SLEPT_S = 1.0
"""A sweep that is late by this much means that this process was stopped, seconds."""


@dataclass(slots=True, eq=False)
class _Session:
    """One caller's cells, which run one after another in the order in which they came. `slot` is None until it has one."""

    slot: Slot | None = None
    num_cells: int = 0  # those that run or wait
    last_used: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Pool:
    """Warm containers behind one queue. Make it and use it inside one event loop."""

    def __init__(self, config: SandboxConfig, metrics: Metrics) -> None:
        self._config = config
        self._launcher = Launcher(config)
        self._slots = Slots(config.max_queue, self._make_room)
        self._places = Places(config, self._slots, metrics, self._make_container)
        self._sessions: dict[str, _Session] = {}
        self._sweeper: asyncio.Task[None] | None = None
        metrics.watch(self.state)

    def open(self) -> None:
        """Start the launcher, while this process may still use the engine."""
        self._launcher.spawn()

    @property
    def broken(self) -> str:
        """Why no more containers can be started; empty as long as they can."""
        return self._launcher.broken

    async def start(self) -> None:
        """Returns when a first container is ready; the others follow. Raises SandboxError if none comes up."""
        await self._launcher.connect()
        self._sweeper = asyncio.create_task(self._sweep())
        await self._places.start()

    async def close(self) -> None:
        """Stop all containers. Calls that run or wait are answered `unavailable`."""
        self._slots.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._places.close()
        await self._launcher.close()

    async def run(
        self, kind: str, code: str, *, timeout_s: float, queue_s: float, session_id: str | None, client: str = ""
    ) -> ToolResult:
        """Run one call of `client`, or one cell of the session `session_id`; it waits at most `queue_s` for a slot."""
        started = time.monotonic()
        try:
            if session_id is not None:
                return await self._run_cell(kind, code, timeout_s, started + queue_s, session_id, client)
            container, slot = await self._slots.acquire(client, queue_s)
            waited = time.monotonic() - started
            reply = await container.call(slot, kind, code, timeout_s)
            return self._result(container, reply, timeout_s, waited, fresh=True)
        except (NoSlotError, RunnerError) as error:
            retry_after_s = error.retry_after_s if isinstance(error, NoSlotError) else self._slots.retry_after_s()
            waited = time.monotonic() - started
            return ToolResult(status="unavailable", message=str(error), queue_s=waited, retry_after_s=retry_after_s)

    def state(self) -> PoolState:
        return PoolState(
            queue=self._slots.num_waiting,
            clients=self._slots.num_clients,
            slots_free=self._slots.num_free,
            slots_taken=self._slots.num_taken,
            sessions=sum(session.slot is not None for session in self._sessions.values()),
            containers=self._places.counts(),
        )

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def _run_cell(
        self, kind: str, code: str, timeout_s: float, queue_until: float, session_id: str, client: str
    ) -> ToolResult:
        started = time.monotonic()
        session = self._sessions.setdefault(session_id, _Session())
        session.num_cells += 1
        try:
            async with self._turn(session.lock, queue_until - started):
                while True:
                    if fresh := session.slot is None:
                        session.slot = await self._slots.acquire(client, queue_until - time.monotonic())
                    where = session.slot
                    assert where is not None
                    waited = time.monotonic() - started
                    reply = await self._call_session(session, where, kind, code, timeout_s, fresh)
                    if reply.status != "gone":
                        return self._result(where[0], reply, timeout_s, waited, fresh=fresh)
        finally:
            session.num_cells -= 1
            session.last_used = time.monotonic()
            if session.slot is None and session.num_cells == 0:
                self._sessions.pop(session_id, None)
            self._slots.dispatch()  # it may make room now for those who wait

    @staticmethod
    async def _call_session(
        session: _Session, where: Slot, kind: str, code: str, timeout_s: float, fresh: bool
    ) -> Reply:
        container, slot = where
        ended = True
        try:
            reply = await container.call(slot, kind, code, timeout_s, session=True, fresh=fresh)
            ended = reply.ended
            return reply
        except asyncio.CancelledError:
            # This holds also if the cell had just ended: its answer won't reach the caller, who can't know the state there.
            if session.slot == where:  # else its process ended, and the slot may be another call's already
                container.end_session(slot)
            raise
        finally:
            if ended and session.slot == where:
                session.slot = None

    def _close_session(self, session: _Session) -> None:
        """Close an idle session: its process is killed, and its slot becomes free once it is clean."""
        assert session.slot is not None
        container, slot = session.slot
        session.slot = None
        container.end_session(slot)

    def _make_room(self, num_short: int) -> None:
        """Close the sessions that were idle longest, one for each call that waits, as calls wait and every slot is taken."""
        idle = [
            session
            for session in self._sessions.values()
            if session.num_cells == 0 and session.slot is not None and self._slots.serves(session.slot[0])
        ]
        for session in sorted(idle, key=lambda s: s.last_used)[:num_short]:
            self._close_session(session)
        if idle:
            self._forget_sessions()

    async def _sweep(self) -> None:
        """Close sessions that weren't used for `session_idle_s`, and check the containers, at regular times."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            # While this process was stopped, no session could be used. That time doesn't count, and what came is read now.
            slept_s, last = now - last - SWEEP_S, now
            for session in self._sessions.values() if slept_s > SLEPT_S else ():
                session.last_used += slept_s
            oldest = now - self._config.session_idle_s
            for session in self._sessions.values():
                if session.num_cells == 0 and session.slot is not None and session.last_used < oldest:
                    self._close_session(session)
            self._forget_sessions()
            self._places.sweep()

    def _forget_sessions(self) -> None:
        for session_id in [i for i, s in self._sessions.items() if s.slot is None and s.num_cells == 0]:
            del self._sessions[session_id]

    @contextlib.asynccontextmanager
    async def _turn(self, lock: asyncio.Lock, timeout_s: float) -> AsyncIterator[None]:
        """Hold `lock`; NoSlotError if the session's earlier cells take longer than `timeout_s`."""
        try:
            async with second_look(timeout_s, SHORT_GRACE_S):
                await lock.acquire()
        except TimeoutError:
            raise self._slots.no_slot(f"the cell waited {timeout_s:.1f} s for earlier cells of its session") from None
        try:
            yield
        finally:
            lock.release()

    # --- containers ---------------------------------------------------------------------------------------------------

    def _make_container(self) -> Container:
        return Container(self._launcher, self._config, self._on_change)

    def _on_change(self, container: Container, slot: int | None) -> None:
        """Handle a slot that is free again, or (None) the container's death, and give free slots to calls that wait."""
        for session in self._sessions.values():
            if session.slot is not None and session.slot[0] is container and slot in (None, session.slot[1]):
                session.slot = None
        if slot is None:
            self._places.died(container)
        else:
            self._slots.freed((container, slot))

    def _result(
        self, container: Container, reply: Reply, timeout_s: float, waited: float, *, fresh: bool
    ) -> ToolResult:
        self._slots.ran(reply.duration_s)
        self._places.ran(container, reply)
        # Its neighbours used up the container's memory. This call did nothing wrong, and it may be run again.
        crowded_out = reply.status == "crowded_out"
        status: ToolStatus = "unavailable" if crowded_out else reply.status  # type: ignore[assignment]  # there is no other
        # The model reads these texts (`actors.episode`): always the same words for the same limit, whatever else happened.
        config = self._config
        limits = {
            "timeout": f"The code was stopped: its time limit is {timeout_s:.3g} s.",
            "output_limit": f"The code was stopped: it wrote more than its limit of {config.max_output_bytes} bytes, and "
            "what it wrote beyond is cut off.",
            "memory": f"The code was stopped: its memory limit is {config.memory_mib} MiB.",
        }
        return ToolResult(
            status=status,
            output=reply.output,
            message=" ".join(filter(None, (limits.get(reply.status), reply.message))),
            duration_s=reply.duration_s,
            queue_s=waited,
            fresh=fresh,
            retry_after_s=self._slots.retry_after_s() if status == "unavailable" else None,
        )
