"""The pool's bookkeeping, with containers that answer when the test says so."""

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

DONE = Reply("ok", "", "out", 0.01, False)


class NoLauncher(Launcher):
    """The containers here need none."""

    async def connect(self) -> None: ...


class FakeContainer(Container):
    """Two slots; a call runs until the test answers it."""

    made: "list[FakeContainer]"
    fail_starts = 0

    async def start(self) -> None:
        FakeContainer.made.append(self)
        if FakeContainer.fail_starts:
            FakeContainer.fail_starts -= 1
            raise RunnerError("did not start")
        self.free = {0, 1}
        self.sent: list[dict[str, Any]] = []

    def _send(self, **frame: Any) -> None:
        self.sent.append(frame)

    def answer(self, reply: Reply) -> None:
        next(iter(self._calls.values())).set_result(reply)

    def release(self, slot: int) -> None:
        self._on_frame({"op": "free", "slot": slot})


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    monkeypatch.setattr(pool_module, "Container", FakeContainer)
    monkeypatch.setattr(pool_module, "Launcher", NoLauncher)
    FakeContainer.made, FakeContainer.fail_starts = [], 0
    pool = Pool(SandboxConfig(num_containers=1, num_spares=0, slots_per_container=2, max_queue=2), Metrics())
    await pool.start()
    yield pool
    await pool.close()


def call(pool: Pool, session_id: str | None = None, queue_s: float = 5.0) -> asyncio.Task[Any]:
    run = pool.run("cold", "1", timeout_s=1.0, queue_s=queue_s, session_id=session_id)
    return asyncio.create_task(run)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_slot_is_taken_until_the_runner_says_it_is_clean(pool: Pool) -> None:
    (container,) = FakeContainer.made
    first, second, third = call(pool), call(pool), call(pool)
    await settle()
    assert container.free == set()
    container.answer(DONE)
    assert (await first).output == "out"
    await settle()
    assert len(container.sent) == 2  # answered, and not yet clean: the third waits
    container.release(container.sent[0]["slot"])
    await settle()
    assert len(container.sent) == 3
    for task in (second, third):
        container.answer(DONE)
        assert (await task).status == "ok"


async def test_one_more_than_may_wait_is_refused_at_once(pool: Pool) -> None:
    tasks = [call(pool) for _ in range(4)]
    await settle()
    result = await call(pool)
    assert (result.status, result.message) == ("unavailable", "2 calls wait for a slot already (sandbox.max_queue)")
    assert result.retry_after_s == 1.5  # two wait already, on two slots, and a call takes a second so far
    for task in tasks:
        task.cancel()


async def test_whoever_waits_too_long_hears_so_and_leaves_the_queue(pool: Pool) -> None:
    running = [call(pool), call(pool)]
    result = await call(pool, queue_s=0.1)
    assert result.status == "unavailable"
    assert result.message == "the call waited 0.1 s for a slot of 1 containers, as did 0 others"
    assert result.queue_s >= 0.1
    assert pool.state().queue == 0
    for task in running:
        task.cancel()


async def test_a_slot_given_at_the_last_moment_is_not_lost(pool: Pool) -> None:
    (container,) = FakeContainer.made
    tasks = [call(pool), call(pool), call(pool)]
    await settle()
    slot = container.sent[0]["slot"]
    container.release(slot)  # hands the slot to the third, which is cancelled before it runs
    tasks[2].cancel()
    await settle()
    assert container.free == {slot}
    for task in tasks:
        task.cancel()


async def test_a_cancelled_call_is_killed_and_its_slot_is_not_free_before_it_is_clean(pool: Pool) -> None:
    (container,) = FakeContainer.made
    task = call(pool)
    await settle()
    task.cancel()
    await settle()
    sent = container.sent[0]
    assert container.sent[1] == {"op": "cancel", "id": sent["id"], "slot": sent["slot"]}
    assert sent["slot"] not in container.free


async def test_closing_answers_those_who_run_and_those_who_wait(pool: Pool) -> None:
    tasks = [call(pool) for _ in range(4)]
    await settle()
    await pool.close()
    results = await asyncio.gather(*tasks)
    assert [result.status for result in results] == ["unavailable"] * 4
    assert results[3].message == "the gateway is stopping"
    assert (await call(pool)).status == "unavailable"


async def test_a_dead_container_fails_its_calls_and_is_replaced(pool: Pool) -> None:
    (container,) = FakeContainer.made
    FakeContainer.fail_starts = 1  # the first attempt to replace it fails, too
    running, waiting, cell = call(pool), call(pool, queue_s=9.0), call(pool, "s", queue_s=9.0)
    await settle()
    container._die("it was killed")
    result = await running
    assert result.status == "unavailable"
    assert result.message.endswith("died: it was killed")
    assert (await waiting).status == "unavailable"
    await asyncio.sleep(places.RESTART_BACKOFF_S[1] + places.RESTART_BACKOFF_S[2] + 0.3)
    replacement = FakeContainer.made[2]
    assert replacement.sent[0]["fresh"]  # the cell that waited
    replacement.answer(DONE)
    assert (await cell).fresh


async def test_a_sessions_second_cell_goes_to_the_same_slot_and_is_not_fresh(pool: Pool) -> None:
    (container,) = FakeContainer.made
    for fresh in (True, False):
        task = call(pool, "s")
        await settle()
        container.answer(DONE)
        assert (await task).fresh is fresh
    assert container.sent[0]["slot"] == container.sent[1]["slot"]


async def test_a_session_that_is_gone_is_opened_anew_in_a_slot_of_its_own(pool: Pool) -> None:
    (container,) = FakeContainer.made
    task = call(pool, "s")
    await settle()
    container.answer(DONE)
    await task
    lost = container.sent[0]["slot"]
    task = call(pool, "s")
    await settle()
    assert not container.sent[1]["fresh"]
    container.answer(Reply("gone", "", "", 0.0, True))
    await settle()
    assert container.sent[2]["fresh"]
    assert container.sent[2]["slot"] != lost
    container.answer(DONE)
    assert (await task).fresh


async def test_sessions_that_ended_are_forgotten(pool: Pool) -> None:
    (container,) = FakeContainer.made
    task = call(pool, "ended")
    await settle()
    container.answer(Reply("ok", "", "", 0.0, True))
    await task
    task = call(pool, "died between cells")
    await settle()
    container.answer(DONE)
    await task
    container.release(container.sent[1]["slot"])
    await asyncio.sleep(pool_module.SWEEP_S + 0.2)
    assert pool._sessions == {}


async def test_one_idle_session_makes_room_for_one_that_waits(pool: Pool) -> None:
    (container,) = FakeContainer.made
    for name in ("old", "young"):
        task = call(pool, name)
        await settle()
        container.answer(DONE)
        await task
    task = call(pool)
    await settle()
    pool._slots.dispatch()  # whatever else happens meanwhile closes no other
    cancels = [frame for frame in container.sent if frame["op"] == "cancel"]
    assert [frame["slot"] for frame in cancels] == [container.sent[0]["slot"]]
    assert pool._sessions["young"].slot is not None
    task.cancel()


async def test_a_session_that_becomes_idle_makes_room_for_one_that_waits_already(pool: Pool) -> None:
    """Nothing else may happen for a long time: whoever waits can't depend on the next call that comes."""
    (container,) = FakeContainer.made
    cells = [call(pool, "a"), call(pool, "b")]
    await settle()
    task = call(pool)
    await settle()
    for cell in cells:
        container.answer(DONE)
        await cell
    assert [frame["slot"] for frame in container.sent if frame["op"] == "cancel"] == [container.sent[0]["slot"]]
    container.release(container.sent[0]["slot"])
    await settle()
    container.answer(DONE)
    assert (await task).status == "ok"
    assert pool._sessions["b"].slot is not None


async def test_a_cell_that_is_cancelled_as_it_ends_leaves_its_slots_next_call_alone(pool: Pool) -> None:
    """Its session's process had ended, and the slot was clean and given to another before the cell's caller vanished."""
    (container,) = FakeContainer.made
    cell = call(pool, "s")
    await settle()
    call(pool, "other")
    await settle()
    following = call(pool)
    await settle()
    container.answer(Reply("ok", "", "", 0.0, True))
    container.release(container.sent[0]["slot"])
    cell.cancel()
    await settle()
    assert [f for f in container.sent if f["op"] == "cancel" and f["id"] is None] == []
    assert container.sent[0]["slot"] not in container.closing
    following.cancel()
