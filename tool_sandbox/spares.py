"""Spare containers, started before they are needed, so that one that dies or must be replaced is replaced at once.

place ──take──▶ a spare that is ready, or else the one that is starting ──▶ in service; the next spare is started
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field

from tool_sandbox.container import Container
from tool_sandbox.errors import SandboxError

STABLE_S = 10.0
"""A spare that lived for this long didn't die because of how it was started, seconds."""


@dataclass(slots=True, eq=False)
class _Spare:
    """A spare that no place has taken yet. `came` brings the container, or None if it didn't start."""

    came: asyncio.Future[Container | None]
    taken: asyncio.Event = field(default_factory=asyncio.Event)


class Spares:
    """The spares of a pool. Make it and use it inside one event loop. None is started before `allow(True)`."""

    def __init__(
        self,
        num_spares: int,
        start: Callable[[], Awaitable[Container]],
        wait_before_next: Callable[[str, int], Awaitable[None]],
    ) -> None:
        """`start` returns a ready container; `wait_before_next(cause, num_failures)` waits after a failure."""
        self._num_spares = num_spares
        self._start = start
        self._wait_before_next = wait_before_next
        self._spares: list[_Spare] = []
        self._allowed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_ready(self) -> int:
        return sum(_is_up(spare) for spare in self._spares)

    def allow(self, allowed: bool) -> None:
        """Set whether another spare may be started now."""
        if not self._tasks and allowed:
            self._tasks = [asyncio.create_task(self._keep()) for _ in range(self._num_spares)]
        if allowed:
            self._allowed.set()
        else:
            self._allowed.clear()

    async def take(self) -> Container | None:
        """A spare that is ready, or the one that is starting. None if there is neither, or if it didn't start."""
        if not self._spares:
            return None
        spare = next(filter(_is_up, self._spares), self._spares[0])
        self._spares.remove(spare)
        spare.taken.set()
        try:
            container = await asyncio.shield(spare.came)
        except asyncio.CancelledError:
            if not spare.came.done():  # give it back, so that another place can take it
                spare.taken.clear()
                self._spares.append(spare)
            elif (unwanted := spare.came.result()) is not None:
                await unwanted.stop()
            raise
        return container if container is not None and not container.dead else None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # each stops its container

    async def _keep(self) -> None:
        """Keeps one spare ready until it is cancelled."""
        num_failures = 0
        while True:
            await self._allowed.wait()
            spare = _Spare(asyncio.get_running_loop().create_future())
            self._spares.append(spare)
            container: Container | None = None
            started = time.monotonic()
            try:
                try:
                    container = await self._start()
                    spare.came.set_result(container)
                    await _first_of(spare.taken.wait(), container.wait_dead())
                    cause = f"the spare {container!r} died: {container.cause_of_death}"
                except (SandboxError, OSError) as error:
                    cause = str(error)
            finally:
                if not spare.came.done():
                    spare.came.set_result(None)
                if spare in self._spares:
                    self._spares.remove(spare)
                if container is not None and not spare.taken.is_set():
                    await container.stop()
            if container is not None and (spare.taken.is_set() or time.monotonic() - started > STABLE_S):
                num_failures = 0
            else:
                num_failures += 1
                await self._wait_before_next(cause, num_failures)


def _is_up(spare: _Spare) -> bool:
    container = spare.came.result() if spare.came.done() else None
    return container is not None and not container.dead


async def _first_of(*waits: Coroutine[object, object, object]) -> None:
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
