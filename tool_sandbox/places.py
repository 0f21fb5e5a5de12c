"""Keeps the containers of a node. Each place holds one; it is replaced when it dies, or before it is retired.

start ──▶ in service ──died──▶ stop it, take the next one
  ▲           │
  │           └──due (age, calls, violations, unhealthy)──▶ take the next one ──▶ retire: no new calls, let those there end,
  │                                                                               stop it
  └── the next one: a spare that is ready or starting (spares.py), or else a container that is started now
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from tool_sandbox.config import SandboxConfig
from tool_sandbox.container import Container, Reply
from tool_sandbox.errors import RunnerError, SandboxError
from tool_sandbox.metrics import Metrics
from tool_sandbox.second_look import second_look
from tool_sandbox.slots import Slots
from tool_sandbox.spares import Spares

logger = logging.getLogger(__name__)

RESTART_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STABLE_S = 3.0
"""A container that served for this long didn't die because of how it was started, so the backoff starts again at zero."""
NUM_FREE_DEATHS = 3
"""This many containers younger than that may die in a row in one place; each is replaced by a spare without a wait."""
RETIRE_CHECK_S = 0.25
PROBE_IDLE_S = 15.0
"""A container that wasn't used for this long runs a test call, so that a hanging runner is found before a client's call."""
PROBE_TIMEOUT_S = 10.0
SPARE_PROBE_S = 3.0
"""Time in which a spare must run a test call before it serves. Otherwise calls would wait on one that is paused or hangs."""
AGE_SPREAD = 0.2
"""Share of `recycle_after_s` by which the ages differ at which containers that started together are replaced."""

VIOLATIONS = ("memory", "output_limit")
"""Statuses of calls that were stopped at a limit. The time limit isn't among them, as honest computations reach it too."""


@dataclass(slots=True, eq=False)
class Member:
    """A container in service, with its history."""

    container: Container
    born: float
    max_age_s: float
    num_calls: int = 0
    num_violations: int = 0
    last_used: float = 0.0
    due: str = ""  # why it must be replaced
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set when it died or must be replaced


def reason_to_recycle(member: Member, config: SandboxConfig, now: float) -> str:
    """Why a container that works must be replaced; empty if it need not be."""
    if config.recycle_after_violations and member.num_violations >= config.recycle_after_violations:
        return "violations"
    if config.recycle_after_calls and member.num_calls >= config.recycle_after_calls:
        return "calls"
    if config.recycle_after_s and now - member.born >= member.max_age_s:
        return "age"
    return ""


class Places:
    """The places of a pool. Make it and use it inside one event loop."""

    def __init__(self, config: SandboxConfig, slots: Slots, metrics: Metrics, make: Callable[[], Container]) -> None:
        self._config = config
        self._slots = slots
        self._metrics = metrics
        self._make = make
        self._members: dict[Container, Member] = {}  # those in service and those that retire
        self._one_at_a_time = asyncio.Lock()
        self._filled: set[asyncio.Future[None]] = set()  # places with a container in service, by their `first`
        self._spares = Spares(config.num_spares, self._start, self._wait_before_next)
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_starting = 0

    async def start(self) -> None:
        """Returns when a first container is ready; the others follow. Raises SandboxError if none comes up."""
        loop = asyncio.get_running_loop()
        firsts: list[asyncio.Future[None]] = [loop.create_future() for _ in range(self._config.num_containers)]
        for first in firsts:
            self._spawn(self._keep(first))
        done: set[asyncio.Future[None]] = set()
        pending = set(firsts)
        async with second_look(
            2 * self._config.start_timeout_s
        ):  # each has its own limit; this one guards against a bug
            while pending and all(first.exception() for first in done):
                more, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                done |= more
        errors = [error for first in done if (error := first.exception())]
        if len(errors) == len(firsts):
            raise errors[0]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._spares.close(), *self._tasks, return_exceptions=True)  # each stops its container

    def counts(self) -> dict[str, int]:
        serving = sum(self._slots.serves(container) for container in self._members)
        return {
            "serving": serving,
            "spare": self._spares.num_ready,
            "starting": self.num_starting,
            "retiring": len(self._members) - serving,
        }

    def died(self, container: Container) -> None:
        """Note that `container` died, so that its place is filled again."""
        self._slots.gone(container)
        if member := self._members.get(container):
            member.changed.set()

    def ran(self, container: Container, reply: Reply) -> None:
        """Count a call that ended in `container`, and check whether the container must be replaced."""
        member = self._members.get(container)
        if member is None:
            return
        member.last_used = time.monotonic()
        member.num_calls += 1
        member.num_violations += reply.status in VIOLATIONS
        if reply.status == "unavailable":  # the runner lives but can't start a process
            self._make_due(member, "unhealthy")
        elif reason := reason_to_recycle(member, self._config, member.last_used):
            self._make_due(member, reason)

    def sweep(self) -> None:
        """Find containers that are too old, and test those that were silent for too long. To be called regularly."""
        now = time.monotonic()
        for member in self._members.values():
            container = member.container
            if not self._slots.serves(container):
                continue
            if reason := reason_to_recycle(member, self._config, now):
                self._make_due(member, reason)
            elif now - member.last_used > PROBE_IDLE_S and container.free:
                member.last_used = now
                self._spawn(self._probe(member))

    # --- one place --------------------------------------------------------------------------------------------------

    async def _keep(self, first: asyncio.Future[None]) -> None:
        """Keeps one place filled until it is cancelled. `first` gets the result of the first attempt."""
        num_failures = 0
        member: Member | None = None
        try:
            while True:
                if member is None:
                    try:
                        member = self._serve(await self._next())
                    except (SandboxError, OSError) as error:
                        if not first.done():
                            first.set_exception(error)
                            first.exception()  # mark it as retrieved: `start` may have returned
                        num_failures += 1
                        await self._wait_before_next(str(error), num_failures)
                        continue
                    if not first.done():
                        first.set_result(None)
                    self._filled.add(first)
                    self._allow_spares()
                await member.changed.wait()
                member.changed.clear()
                if member.container.dead:
                    num_failures = 0 if time.monotonic() - member.born > STABLE_S else num_failures + 1
                    cause = f"{member.container!r} died: {member.container.cause_of_death}"
                    self._metrics.died.inc()
                    self._members.pop(member.container, None)
                    self._spawn(member.container.stop())  # its place need not wait until the engine has cleaned up
                    member = None
                    if self._spares.num_ready and num_failures <= NUM_FREE_DEATHS:
                        logger.warning("%s; a spare takes its place", cause)
                    else:
                        self._filled.discard(first)
                        self._allow_spares()
                        await self._wait_before_next(cause, num_failures)
                else:
                    member = await self._replace(member)
        finally:
            if member is not None:
                self._members.pop(member.container, None)
                await member.container.stop()

    def _allow_spares(self) -> None:
        """Let spares start once all places are filled."""
        self._spares.allow(len(self._filled) == self._config.num_containers)

    async def _start(self) -> Container:
        """Start a container and return it when it is ready. Errors: SandboxError, OSError."""
        container = self._make()
        self.num_starting += 1
        ready = False
        try:
            await container.start()
            ready = not container.dead
        finally:
            self.num_starting -= 1
            if not ready:
                await container.stop()
        if not ready:
            raise RunnerError(f"{container!r} died: {container.cause_of_death}")
        return container

    async def _next(self) -> Container:
        """A spare that has just passed a test call, or else a newly started container. Errors: SandboxError, OSError."""
        for _ in range(self._config.num_spares):
            if (spare := await self._spares.take()) is None:
                break
            try:
                answers = await _answers(spare)
            except BaseException:  # cancelled: nobody else would stop the spare
                await spare.stop()
                raise
            if answers:
                return spare
            logger.warning("the spare %r did not run a call within %.0f s; it is stopped", spare, SPARE_PROBE_S)
            self._spawn(spare.stop())
        return await self._start()

    def _serve(self, container: Container) -> Member:
        """Send calls to `container` from now on."""
        now = time.monotonic()
        spread = 1.0 - AGE_SPREAD * random.random()
        member = Member(container, now, self._config.recycle_after_s * spread, last_used=now)
        self._members[container] = member
        self._metrics.started.inc()
        self._slots.open(container)
        return member

    async def _replace(self, member: Member) -> Member:
        """Replace `member` by the next container and let it retire. It stays in service if there is no next one."""
        async with self._one_at_a_time:  # memory and cores are enough for one more container, not for twice as many
            try:
                following = self._serve(await self._next())
            except (SandboxError, OSError) as error:
                logger.warning("%r is due (%s) and stays: %s", member.container, member.due, error)
                member.due, member.num_calls, member.num_violations = "", 0, 0
                member.born = time.monotonic()
                return member
        self._metrics.recycled.labels(reason=member.due).inc()
        logger.info("%r retires: %s", member.container, member.due)
        self._slots.retire(member.container)
        self._spawn(self._retire(member))
        return following

    async def _retire(self, member: Member) -> None:
        """Stop it when its calls and sessions have ended. The wait is bounded, as a session may never be idle."""
        container = member.container
        try:
            with contextlib.suppress(TimeoutError):
                async with second_look(self._config.max_timeout_s + self._config.session_idle_s):
                    while not container.dead and self._slots.num_held(container):
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(container.wait_dead(), RETIRE_CHECK_S)
        finally:
            self._members.pop(container, None)
            await container.stop()

    async def _probe(self, member: Member) -> None:
        """Run a test call. A container that misses the deadline is ended by `Container.call`."""
        container = member.container
        if not container.free or not self._slots.serves(container):
            return
        slot = (container, container.free.pop())
        self._slots.hold(slot)
        try:
            reply = await container.call(slot[1], "cold", "pass", PROBE_TIMEOUT_S)
        except RunnerError as error:
            logger.warning("%r did not answer a probe: %s", container, error)
            return
        if reply.status != "ok":
            self._make_due(member, "unhealthy")

    def _make_due(self, member: Member, reason: str) -> None:
        if not member.due and self._slots.serves(member.container):
            member.due = reason
            member.changed.set()

    async def _wait_before_next(self, cause: str, num_failures: int) -> None:
        backoff_s = RESTART_BACKOFF_S[min(num_failures, len(RESTART_BACKOFF_S) - 1)]
        logger.warning("%s; starting another in %.1f s", cause, backoff_s)
        await asyncio.sleep(backoff_s)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _answers(container: Container) -> bool:
    """Whether a container that serves no calls yet runs a test call within `SPARE_PROBE_S`."""
    try:
        async with second_look(SPARE_PROBE_S):
            reply = await container.call(container.free.pop(), "cold", "pass", SPARE_PROBE_S)
    except (RunnerError, TimeoutError):
        return False
    return reply.status == "ok"
