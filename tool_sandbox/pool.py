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
from tool_sandbox.container import Container, Reply
from tool_sandbox.errors import RunnerError, SandboxError
from trajectory.types import ToolResult, ToolStatus

logger = logging.getLogger(__name__)

RESTART_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SWEEP_S = 1.0

Slot = tuple[Container, int]


@dataclass(slots=True)
class _Session:
    """A process that waits for its next cell."""

    container: Container
    slot: int
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    last_used: float = field(default_factory=time.monotonic)


class Pool:
    """Warm containers behind one queue. Made and used inside one event loop."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._image = build.resolve_image(config)
        self._prefix = f"autotraj-{os.getpid()}-{secrets.token_hex(3)}"
        self._containers: list[Container] = []
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._sessions: dict[str, _Session] = {}
        self._opening: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_started = 0
        self._closed = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def start(self) -> None:
        """Returns when a first container is ready; the others follow. Raises SandboxError if none comes up."""
        await asyncio.to_thread(build.check_ready, self._config)
        starts = [asyncio.create_task(self._add()) for _ in range(self._config.num_containers)]
        done, pending = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
        while pending and all(task.exception() for task in done):
            more, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        errors = [error for task in done if (error := task.exception())]
        if len(errors) == len(starts):
            raise errors[0]
        for task in pending:
            self._keep(task)
        self._keep(asyncio.create_task(self._sweep()))

    async def close(self) -> None:
        """Stop all containers. Calls still running answer `unavailable`."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for future in self._waiting:
            future.cancel()
        await asyncio.gather(*(container.stop() for container in self._containers))

    async def run(
        self, kind: str, code: str, *, timeout_s: float, queue_s: float, session_id: str | None
    ) -> ToolResult:
        """One call, or one cell of the session `session_id`; waits `queue_s` seconds at most for a slot."""
        if session_id is not None:
            return await self._run_cell(kind, code, timeout_s, queue_s, session_id)
        queued = time.monotonic()
        try:
            container, slot = await self._acquire(queue_s)
        except (asyncio.QueueFull, TimeoutError) as error:
            return self._no_slot(error, queue_s)
        waited = time.monotonic() - queued
        try:
            reply = await container.call(slot, kind, code, timeout_s, session=False)
        except RunnerError as error:
            return ToolResult(status="unavailable", message=str(error), queue_s=waited, retry_after_s=1.0)
        return self._result(reply, timeout_s, waited, fresh=True)

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def _run_cell(self, kind: str, code: str, timeout_s: float, queue_s: float, session_id: str) -> ToolResult:
        queued = time.monotonic()
        lock = self._opening.setdefault(session_id, asyncio.Lock())
        async with lock:  # one cell after another: their order is the caller's
            session = self._sessions.get(session_id)
            fresh = session is None or session.container.dead
            if session is None or session.container.dead:
                try:
                    container, slot = await self._acquire(queue_s)
                except (asyncio.QueueFull, TimeoutError) as error:
                    return self._no_slot(error, queue_s)
                session = self._sessions[session_id] = _Session(container, slot)
            waited = time.monotonic() - queued
            async with session.lock:
                try:
                    reply = await session.container.call(session.slot, kind, code, timeout_s, session=True)
                except RunnerError as error:
                    self._sessions.pop(session_id, None)
                    return ToolResult(status="unavailable", message=str(error), queue_s=waited, retry_after_s=1.0)
                except asyncio.CancelledError:
                    self._sessions.pop(session_id, None)  # its process was killed with the cell
                    raise
                session.last_used = time.monotonic()
                if reply.ended:
                    self._sessions.pop(session_id, None)
                return self._result(reply, timeout_s, waited, fresh=fresh)

    def _close_session(self, session_id: str) -> None:
        session = self._sessions.pop(session_id)
        self._opening.pop(session_id, None)
        if not session.container.dead:
            session.container.end_session(session.slot)

    async def _sweep(self) -> None:
        """Closes sessions that nobody used for `session_idle_s`, or whose container died."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for session_id, session in list(self._sessions.items()):
                idle = now - session.last_used > self._config.session_idle_s
                if not session.lock.locked() and (idle or session.container.dead):
                    self._close_session(session_id)

    # --- slots --------------------------------------------------------------------------------------------------------

    async def _acquire(self, timeout_s: float) -> Slot:
        """A clean slot. asyncio.QueueFull if too many wait already, TimeoutError after `timeout_s`."""
        if len(self._waiting) >= self._config.max_queue and not any(c.free for c in self._containers if not c.dead):
            raise asyncio.QueueFull
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._dispatch()
        try:
            return await asyncio.wait_for(asyncio.shield(future), timeout_s)
        except BaseException:
            if future.done() and not future.cancelled():  # given at the last moment: give it back
                container, slot = future.result()
                container.free.add(slot)
            else:
                future.cancel()
                self._waiting.remove(future)
            self._dispatch()
            raise

    def _dispatch(self) -> None:
        """Hands free slots to those who wait, from the container with the most of them."""
        while self._waiting:
            container = max((c for c in self._containers if not c.dead), key=lambda c: len(c.free), default=None)
            if container is None or not container.free:
                break
            self._waiting.popleft().set_result((container, container.free.pop()))
        if self._waiting:
            self._evict()

    def _evict(self) -> None:
        """Someone waits and every slot is taken: the session that was idle longest makes room."""
        idle = [(s.last_used, i) for i, s in self._sessions.items() if not s.lock.locked() and not s.container.dead]
        if idle:
            self._close_session(min(idle)[1])

    def _no_slot(self, error: BaseException, queue_s: float) -> ToolResult:
        if isinstance(error, asyncio.QueueFull):
            message = f"{len(self._waiting)} calls wait already (sandbox.max_queue)"
        else:
            message = f"the call waited {queue_s:.1f} s for a free slot, behind {len(self._waiting)} others"
        return ToolResult(status="unavailable", message=message, queue_s=queue_s, retry_after_s=1.0)

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

    async def _add(self) -> None:
        self._num_started += 1
        container = Container(
            f"{self._prefix}-{self._num_started}", self._image, self._config, on_change=self._on_change
        )
        self._containers.append(container)
        try:
            await container.start()
        except RunnerError:
            if container in self._containers:
                self._containers.remove(container)
            raise
        self._dispatch()

    def _on_change(self) -> None:
        """A slot is free again, or a container died: hand out, replace."""
        for container in [c for c in self._containers if c.dead]:
            self._containers.remove(container)
            if container.was_ready and not self._closed:
                logger.warning("%r died (%s); starting another", container, container.cause_of_death)
                self._keep(asyncio.create_task(self._replace(container)))
        self._dispatch()

    async def _replace(self, dead: Container) -> None:
        await dead.stop()
        for attempt, backoff_s in enumerate(RESTART_BACKOFF_S):
            await asyncio.sleep(backoff_s)
            try:
                await self._add()
                return
            except SandboxError as error:
                logger.warning("attempt %d to replace %r failed: %s", attempt + 1, dead, error)
        logger.error("gave up on replacing %r; %d containers are left", dead, len(self._containers))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
