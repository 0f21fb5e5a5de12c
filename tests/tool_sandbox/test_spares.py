"""Containers ahead of demand: taken when one dies or is due, replaced behind, never in the way of the places."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tool_sandbox import places
from tool_sandbox import pool as pool_module
from tool_sandbox.config import SandboxConfig
from tool_sandbox.container import Container, Reply
from tool_sandbox.errors import RunnerError
from tool_sandbox.launcher import Launcher
from tool_sandbox.metrics import Metrics
from tool_sandbox.pool import Pool


class NoLauncher(Launcher):
    """The containers here need none."""

    async def connect(self) -> None: ...


class SlowContainer(Container):
    """Two slots; it is ready when the test says so, and answers at once."""

    made: "list[SlowContainer]"
    stopped = False
    frozen = False  # it is up, and answers nothing

    async def start(self) -> None:
        SlowContainer.made.append(self)
        self.go = asyncio.Event()
        self.fails = False
        await self.go.wait()
        if self.fails:
            raise RunnerError("did not start")
        self.free = {0, 1}

    async def stop(self) -> None:
        self.stopped = True
        await super().stop()

    def _send(self, **frame: Any) -> None:
        if self.frozen:
            return
        loop = asyncio.get_running_loop()
        loop.call_soon(self._calls[frame["id"]].set_result, Reply("ok", "", repr(self), 0.01, True))
        loop.call_soon(self._on_frame, {"op": "free", "slot": frame["slot"]})


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def where(pool: Pool) -> str:
    """Which container answers."""
    result = await pool.run("cold", "1", timeout_s=1.0, queue_s=10.0, session_id=None)
    assert result.status == "ok", result.message
    return result.output


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    monkeypatch.setattr(pool_module, "Container", SlowContainer)
    monkeypatch.setattr(pool_module, "Launcher", NoLauncher)
    monkeypatch.setattr(places, "RETIRE_CHECK_S", 0.01)
    SlowContainer.made = []
    pool = Pool(SandboxConfig(num_containers=1, num_spares=1, recycle_after_calls=3), Metrics())
    starting = asyncio.create_task(pool.start())
    await until(lambda: SlowContainer.made)
    SlowContainer.made[0].go.set()
    await starting
    await until(lambda: len(SlowContainer.made) == 2)
    yield pool
    await pool.close()
    assert all(container.stopped for container in SlowContainer.made)


async def test_a_spare_takes_the_place_of_one_that_died_and_another_is_started(pool: Pool) -> None:
    first, spare = SlowContainer.made
    spare.go.set()
    await until(lambda: pool.state().containers["spare"] == 1)
    assert await where(pool) == repr(first)
    first._die("it was killed")
    assert await where(pool) == repr(spare)  # while the next one doesn't get ready
    await until(lambda: len(SlowContainer.made) == 3)
    assert pool.state().containers == {"serving": 1, "spare": 0, "starting": 1, "retiring": 0}


async def test_a_spare_that_is_coming_is_waited_for(pool: Pool) -> None:
    first, spare = SlowContainer.made
    first._die("it was killed")
    call = asyncio.create_task(where(pool))
    await asyncio.sleep(places.RESTART_BACKOFF_S[1] + 0.1)
    spare.go.set()
    assert await call == repr(spare)


async def test_a_due_container_is_replaced_by_the_spare(pool: Pool) -> None:
    first, spare = SlowContainer.made
    spare.go.set()
    await until(lambda: pool.state().containers["spare"] == 1)
    for _ in range(3):
        assert await where(pool) == repr(first)
    await until(lambda: first.stopped)
    assert await where(pool) == repr(spare)


async def test_a_spare_that_died_is_never_used_and_is_replaced(pool: Pool) -> None:
    first, spare = SlowContainer.made
    spare.go.set()
    await until(lambda: pool.state().containers["spare"] == 1)
    spare._die("it was killed")
    await until(lambda: len(SlowContainer.made) == 3)
    assert pool.state().containers["spare"] == 0
    SlowContainer.made[2].go.set()
    await until(lambda: pool.state().containers["spare"] == 1)
    first._die("it was killed")
    assert await where(pool) == repr(SlowContainer.made[2])


async def test_a_spare_that_answers_nothing_never_serves(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that `docker pause` stopped: it isn't dead, and would keep each call until its deadline."""
    monkeypatch.setattr(places, "SPARE_PROBE_S", 0.05)
    first, spare = SlowContainer.made
    spare.go.set()
    await until(lambda: pool.state().containers["spare"] == 1)
    spare.frozen = True
    first._die("it was killed")
    await until(lambda: spare.stopped)
    await until(lambda: len(SlowContainer.made) >= 3)
    for container in SlowContainer.made[2:]:
        container.go.set()
    assert await where(pool) in [repr(container) for container in SlowContainer.made[2:]]


async def test_a_spare_that_does_not_start_leaves_its_place_to_one_that_does(pool: Pool) -> None:
    first, spare = SlowContainer.made
    first._die("it was killed")
    await asyncio.sleep(places.RESTART_BACKOFF_S[1] + 0.1)  # the place has taken it
    spare.fails = True
    spare.go.set()
    await until(lambda: len(SlowContainer.made) == 3)
    SlowContainer.made[2].go.set()
    assert await where(pool) == repr(SlowContainer.made[2])


async def test_containers_that_die_young_one_after_another_wait_before_they_use_up_spares(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "RESTART_BACKOFF_S", (0.0, 0.0, 0.0, 0.0, 15.0))
    for number in range(places.NUM_FREE_DEATHS + 1):
        serving, spare = SlowContainer.made[number : number + 2]
        spare.go.set()
        await until(lambda: pool.state().containers["spare"] == 1)
        assert await where(pool) == repr(serving)
        serving._die("it was killed")
        if number < places.NUM_FREE_DEATHS:
            await until(lambda number=number: len(SlowContainer.made) == number + 3)  # type: ignore[misc]
    await asyncio.sleep(0.1)
    assert pool.state().containers == {"serving": 0, "spare": 1, "starting": 0, "retiring": 0}
