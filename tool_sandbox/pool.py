"""A node's containers, and who gets the next slot.

    call ──▶ queue (bounded, first come first served) ──▶ a free slot ──▶ container
                         ▲                                    │
                         └──── slot clean again, container replaced, idle session closed

A container that dies fails the calls in it, each with an explicit status, and is replaced in the background.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import deque
from dataclasses import dataclass, field

from tool_sandbox import build
from tool_sandbox.config import SandboxConfig
from tool_sandbox.container import Container, Reply, SessionLost
from tool_sandbox.errors import RunnerError, SandboxError
from tool_sandbox.left_behind import remove_left_behind
from trajectory.types import ToolResult, ToolStatus

logger = logging.getLogger(__name__)

BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
SWEEP_S = 1.0

Slot = tuple[Container, int]


class _NoSlot(Exception):
    """The queue is full, or the wait was too long."""


@dataclass(slots=True)
class _Session:
    """One caller's interpreter: a slot that is kept between cells, or None when its state is lost."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_cells: int = 0  # that run or wait for the lock
    slot: Slot | None = None
    last_used: float = field(default_factory=time.monotonic)


class Pool:
    """Warm containers behind one queue. Made and used inside one event loop."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._image = build.resolve_image(config)
        self._prefix = f"autotraj-{os.getpid()}-{secrets.token_hex(3)}"
        self._containers: list[Container] = []  # ready ones
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._sessions: dict[str, _Session] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._num_started = 0

    async def start(self) -> None:
        """Returns when a first container is ready; the others follow. Raises SandboxError if none comes up."""
        await asyncio.to_thread(build.check_ready, self._config)
        await asyncio.to_thread(remove_left_behind)
        started: asyncio.Queue[SandboxError | None] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._keep_one(started)) for _ in range(self._config.num_containers)]
        self._tasks.append(asyncio.create_task(self._sweep()))
        for _ in range(self._config.num_containers):  # each says one thing, `start_timeout_s` at the latest
            error = await started.get()
            if error is None:
                return
        assert error is not None
        raise error

    async def close(self) -> None:
        """Stop all containers. Calls still running answer `unavailable`."""
        for task in self._tasks:
            task.cancel()
        for future in self._waiting:
            future.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # each stops its container

    async def run(
        self, kind: str, code: str, *, timeout_s: float, queue_s: float, session_id: str | None
    ) -> ToolResult:
        """One call, or one cell of the session `session_id`; waits `queue_s` seconds at most for a slot."""
        queued = time.monotonic()
        try:
            if session_id is not None:
                return await self._run_cell(kind, code, timeout_s, queued + queue_s, session_id)
            container, slot = await self._acquire(queued + queue_s)
            waited = time.monotonic() - queued
            reply = await container.call(slot, kind, code, timeout_s)
            return _result(reply, timeout_s, waited, fresh=True)
        except (_NoSlot, RunnerError) as error:
            waited = time.monotonic() - queued
            return ToolResult(status="unavailable", message=str(error), queue_s=waited, retry_after_s=1.0)

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def _run_cell(self, kind: str, code: str, timeout_s: float, until: float, session_id: str) -> ToolResult:
        session = self._sessions.setdefault(session_id, _Session())
        session.num_cells += 1
        queued = time.monotonic()
        try:
            try:  # one cell after another: their order is the caller's
                await asyncio.wait_for(session.lock.acquire(), until - queued)
            except TimeoutError:
                raise _NoSlot(f"the cell waited {until - queued:.1f} s for the one before it") from None
            try:
                return await self._run_locked(session, kind, code, timeout_s, queued, until)
            finally:
                session.last_used = time.monotonic()
                session.lock.release()
        finally:
            session.num_cells -= 1
            if session.slot is None and not session.num_cells:
                self._sessions.pop(session_id, None)

    async def _run_locked(
        self, session: _Session, kind: str, code: str, timeout_s: float, queued: float, until: float
    ) -> ToolResult:
        while True:
            fresh = session.slot is None
            taken = session.slot or await self._acquire(until)
            session.slot = taken
            container, slot = taken
            waited = time.monotonic() - queued
            try:
                reply = await container.call(slot, kind, code, timeout_s, session=True, resume=not fresh)
            except SessionLost:
                session.slot = None  # it becomes free by itself; once more, in another
                continue
            except BaseException:
                session.slot = None  # the process is gone with its container, or killed with the cancelled cell
                raise
            if reply.ended:
                session.slot = None
            return _result(reply, timeout_s, waited, fresh=fresh)

    async def _sweep(self) -> None:
        """Closes sessions that nobody used for `session_idle_s`, and one whenever a call waited for a whole sweep."""
        while True:
            first = next(iter(self._waiting), None)
            await asyncio.sleep(SWEEP_S)
            if first is not None and first in self._waiting:
                self._evict()
            too_old = time.monotonic() - self._config.session_idle_s
            for session_id, session in list(self._sessions.items()):
                if not session.num_cells and session.last_used < too_old:
                    self._close_session(session_id)

    def _close_session(self, session_id: str) -> None:
        session = self._sessions.pop(session_id)
        if session.slot is not None:
            container, slot = session.slot
            container.end_session(slot)

    # --- slots --------------------------------------------------------------------------------------------------------

    async def _acquire(self, until: float) -> Slot:
        """A clean slot. _NoSlot if too many wait already, or at the time `until`."""
        if len(self._waiting) >= self._config.max_queue and not any(c.free for c in self._containers):
            raise _NoSlot(f"{len(self._waiting)} calls wait for a slot already (sandbox.max_queue)")
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._dispatch()
        timeout_s = max(0.0, until - time.monotonic())
        try:
            return await asyncio.wait_for(asyncio.shield(future), timeout_s)
        except BaseException as error:
            if future in self._waiting:
                self._waiting.remove(future)
            elif not future.cancelled():  # given at the last moment: give it back
                container, slot = future.result()
                if not container.dead:
                    container.free.add(slot)
                self._dispatch()
            if isinstance(error, TimeoutError):
                num = len(self._waiting)
                raise _NoSlot(f"the call waited {timeout_s:.1f} s for a free slot, {num} others with it") from None
            raise

    def _dispatch(self) -> None:
        """Hands free slots to those who wait, from the container with the most of them."""
        while self._waiting:
            container = max(self._containers, key=lambda c: len(c.free), default=None)
            if container is None or not container.free:
                break
            self._waiting.popleft().set_result((container, container.free.pop()))
        if self._waiting and len(self._idle()) == len(self._containers) * self._config.slots_per_container:
            self._evict()  # nothing runs that could make room

    def _idle(self) -> list[tuple[float, str]]:
        """Sessions that hold a slot and run nothing: when each was last used, and its id."""
        return [(s.last_used, name) for name, s in self._sessions.items() if s.slot is not None and not s.num_cells]

    def _evict(self) -> None:
        """The session that was idle longest makes room."""
        if idle := self._idle():
            self._close_session(min(idle)[1])

    def _on_free(self, container: Container, slot: int) -> None:
        """A slot is clean again. If it was a session's, the session ended by itself."""
        for session_id, session in list(self._sessions.items()):
            if session.slot == (container, slot):
                session.slot = None
                if not session.num_cells:
                    del self._sessions[session_id]
        self._dispatch()

    # --- containers ---------------------------------------------------------------------------------------------------

    async def _keep_one(self, started: asyncio.Queue[SandboxError | None]) -> None:
        """One of the containers, replaced whenever it dies, for ever; what came of the first start goes to `started`."""
        backoff_s = BACKOFF_S
        while True:
            self._num_started += 1
            name = f"{self._prefix}-{self._num_started}"
            container = Container(name, self._image, self._config, self._on_free)
            try:
                await container.start()
                started.put_nowait(None)
                self._containers.append(container)
                self._dispatch()
                backoff_s = BACKOFF_S
                await container.wait_dead()
                logger.warning("%r died (%s); starting another", container, container.cause_of_death)
            except SandboxError as error:
                started.put_nowait(error)
                logger.warning("%s; next try in %.1f s", error, backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            finally:
                self._forget(container)
                stopping = asyncio.create_task(container.stop())
                await asyncio.shield(stopping)

    def _forget(self, container: Container) -> None:
        if container in self._containers:
            self._containers.remove(container)
        for session_id, session in list(self._sessions.items()):
            if session.slot is not None and session.slot[0] is container and not session.num_cells:
                del self._sessions[session_id]


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
