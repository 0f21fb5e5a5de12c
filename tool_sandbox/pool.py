"""A node's containers, and who gets the next slot.

    call ──▶ queue (bounded, first come first served) ──▶ a free slot ──▶ container
                         ▲                                    │
                         └──── slot clean again, container replaced, idle session closed

A container that dies fails the calls in it, each with an explicit status, and its place in the pool is filled again for as
long as the pool is open. A session keeps its slot between cells; it loses it, and its state, when nobody used it for
`session_idle_s`, or when it is idle and another call has no slot. Its next cell then starts anew and says so (`fresh`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tool_sandbox import build
from tool_sandbox.config import SandboxConfig
from tool_sandbox.container import Container, Reply
from tool_sandbox.errors import RunnerError, SandboxError
from tool_sandbox.left_behind import remove_left_behind
from trajectory.types import ToolResult, ToolStatus

logger = logging.getLogger(__name__)

RESTART_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STABLE_S = 10.0
"""A container that lived so long didn't die of how we start it: the backoff begins anew."""
SWEEP_S = 1.0

Slot = tuple[Container, int]


class _NoSlotError(Exception):
    """No slot for this call: too many wait, it waited too long, or the pool closed. The text says which."""


@dataclass(slots=True, eq=False)
class _Session:
    """One caller's cells, run one after another in the order they came. `slot` is None until one is open."""

    slot: Slot | None = None
    num_cells: int = 0  # that run or wait
    last_used: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Pool:
    """Warm containers behind one queue. Made and used inside one event loop."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._image = build.resolve_image(config)
        self._prefix = f"autotraj-{os.getpid()}-{secrets.token_hex(3)}"
        self._containers: list[Container] = []
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._sessions: dict[str, _Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_started = 0
        self._closed = False

    async def start(self) -> None:
        """Returns when a first container is ready; the others follow. Raises SandboxError if none comes up."""
        await asyncio.to_thread(build.check_ready, self._config)
        await asyncio.to_thread(remove_left_behind)
        loop = asyncio.get_running_loop()
        firsts: list[asyncio.Future[None]] = [loop.create_future() for _ in range(self._config.num_containers)]
        for first in firsts:
            self._keep(asyncio.create_task(self._fill_place(first)))
        self._keep(asyncio.create_task(self._sweep()))
        done: set[asyncio.Future[None]] = set()
        pending = set(firsts)
        async with asyncio.timeout(
            2 * self._config.start_timeout_s
        ):  # each keeps its own limit; this is against a defect
            while pending and all(first.exception() for first in done):
                more, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                done |= more
        errors = [error for first in done if (error := first.exception())]
        if len(errors) == len(firsts):
            raise errors[0]

    async def close(self) -> None:
        """Stop all containers. Calls that run or wait are answered `unavailable`."""
        self._closed = True
        for future in self._waiting:
            future.set_exception(_NoSlotError("the gateway is stopping"))
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # each stops its container

    async def run(
        self, kind: str, code: str, *, timeout_s: float, queue_s: float, session_id: str | None
    ) -> ToolResult:
        """One call, or one cell of the session `session_id`; waits `queue_s` seconds at most for a slot."""
        started = time.monotonic()
        try:
            if session_id is not None:
                return await self._run_cell(kind, code, timeout_s, started + queue_s, session_id)
            container, slot = await self._acquire(queue_s)
            waited = time.monotonic() - started
            return self._result(await container.call(slot, kind, code, timeout_s), timeout_s, waited, fresh=True)
        except (_NoSlotError, RunnerError) as error:
            waited = time.monotonic() - started
            return ToolResult(status="unavailable", message=str(error), queue_s=waited, retry_after_s=1.0)

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def _run_cell(
        self, kind: str, code: str, timeout_s: float, queue_until: float, session_id: str
    ) -> ToolResult:
        started = time.monotonic()
        session = self._sessions.setdefault(session_id, _Session())
        session.num_cells += 1
        try:
            async with _turn(session.lock, queue_until - started):
                while True:
                    if fresh := session.slot is None:
                        session.slot = await self._acquire(queue_until - time.monotonic())
                    assert session.slot is not None
                    waited = time.monotonic() - started
                    reply = await self._call_session(session, session.slot, kind, code, timeout_s, fresh)
                    if reply.status != "gone":
                        return self._result(reply, timeout_s, waited, fresh=fresh)
        finally:
            session.num_cells -= 1
            session.last_used = time.monotonic()
            if session.slot is None and session.num_cells == 0:
                self._sessions.pop(session_id, None)

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
            # Also if the cell had just ended: its answer won't reach the caller, who can't know what state is there.
            container.end_session(slot)
            raise
        finally:
            if ended and session.slot == where:
                session.slot = None

    def _close_session(self, session: _Session) -> None:
        """Only of an idle one: its process is killed, its slot comes back when it is clean."""
        assert session.slot is not None
        container, slot = session.slot
        session.slot = None
        container.end_session(slot)

    async def _sweep(self) -> None:
        """Closes sessions that nobody used for `session_idle_s`."""
        while True:
            await asyncio.sleep(SWEEP_S)
            oldest = time.monotonic() - self._config.session_idle_s
            for session in self._sessions.values():
                if session.num_cells == 0 and session.slot is not None and session.last_used < oldest:
                    self._close_session(session)
            self._forget_sessions()

    def _forget_sessions(self) -> None:
        for session_id in [i for i, s in self._sessions.items() if s.slot is None and s.num_cells == 0]:
            del self._sessions[session_id]

    # --- slots --------------------------------------------------------------------------------------------------------

    async def _acquire(self, timeout_s: float) -> Slot:
        """A clean slot; _NoSlotError if too many wait already, and after `timeout_s`."""
        if self._closed:
            raise _NoSlotError("the gateway is stopping")
        if len(self._waiting) >= self._config.max_queue and not any(c.free for c in self._containers):
            raise _NoSlotError(f"{len(self._waiting)} calls wait for a slot already (sandbox.max_queue)")
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._dispatch()
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)
        except (TimeoutError, asyncio.CancelledError) as error:
            if not future.done():
                self._waiting.remove(future)
                future.cancel()
            elif future.exception() is None:  # given at the last moment: give it back
                container, slot = future.result()
                container.free.add(slot)
                self._dispatch()
            if isinstance(error, TimeoutError):
                raise _NoSlotError(
                    f"the call waited {max(timeout_s, 0.0):.1f} s for a slot of {len(self._containers)} containers, "
                    f"as did {len(self._waiting)} others"
                ) from None
            raise

    def _dispatch(self) -> None:
        """Hands free slots to those who wait, from the container with the most of them."""
        while self._waiting:
            container = max(self._containers, key=lambda c: len(c.free), default=None)
            if container is None or not container.free:
                break
            self._waiting.popleft().set_result((container, container.free.pop()))
        # Someone waits and every slot is taken: the sessions that were idle longest make room, one for each who waits.
        num_short = len(self._waiting) - sum(len(container.closing) for container in self._containers)
        if num_short > 0:
            idle = [s for s in self._sessions.values() if s.slot is not None and s.num_cells == 0]
            for session in sorted(idle, key=lambda s: s.last_used)[:num_short]:
                self._close_session(session)

    @staticmethod
    def _result(reply: Reply, timeout_s: float, waited: float, *, fresh: bool) -> ToolResult:
        status: ToolStatus = reply.status  # type: ignore[assignment]  # the runner has no other
        messages = {
            "timeout": f"killed at its limit of {timeout_s:g} s",
            "output_limit": "killed because it wrote too much",
        }
        return ToolResult(
            status=status,
            output=reply.output,
            message=reply.message or messages.get(reply.status, ""),
            duration_s=reply.duration_s,
            queue_s=waited,
            fresh=fresh,
        )

    # --- containers ---------------------------------------------------------------------------------------------------

    async def _fill_place(self, first: asyncio.Future[None]) -> None:
        """Keeps one container alive; `first` tells how the first attempt went."""
        num_failures = 0
        while True:
            self._num_started += 1
            name = f"{self._prefix}-{self._num_started}"
            container = Container(name, self._image, self._config, self._on_change)
            started = time.monotonic()
            try:
                await container.start()
                self._containers.append(container)
                if not first.done():
                    first.set_result(None)
                self._dispatch()
                await container.wait_dead()
            except (SandboxError, OSError) as error:
                if not first.done():
                    first.set_exception(error)
                    first.exception()  # retrieved: `start` may have returned
            finally:
                if container in self._containers:
                    self._containers.remove(container)
                await container.stop()
            num_failures = 0 if time.monotonic() - started > STABLE_S else num_failures + 1
            backoff_s = RESTART_BACKOFF_S[min(num_failures, len(RESTART_BACKOFF_S) - 1)]
            logger.warning("%r died: %s; starting another in %.1f s", container, container.cause_of_death, backoff_s)
            await asyncio.sleep(backoff_s)

    def _on_change(self, container: Container, slot: int | None) -> None:
        """A slot is free again or (None) the container died: a session that was there is no more; hand out."""
        if slot is None and container in self._containers:
            self._containers.remove(container)
        for session in self._sessions.values():
            if session.slot is not None and session.slot[0] is container and slot in (None, session.slot[1]):
                session.slot = None
        self._dispatch()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@contextlib.asynccontextmanager
async def _turn(lock: asyncio.Lock, timeout_s: float) -> AsyncIterator[None]:
    """Hold `lock`; _NoSlotError if the session's earlier cells take longer than `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            await lock.acquire()
    except TimeoutError:
        raise _NoSlotError(f"the cell waited {timeout_s:.1f} s for earlier cells of its session") from None
    try:
        yield
    finally:
        lock.release()
