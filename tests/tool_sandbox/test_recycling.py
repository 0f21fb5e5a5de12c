"""Containers that are due: the next is up before the last one goes, and nobody's call is lost over it."""

import asyncio
import time
from typing import Any

import pytest

from tool_sandbox import places
from tool_sandbox import pool as pool_module
from tool_sandbox.config import SandboxConfig
from tool_sandbox.container import Container, Reply
from tool_sandbox.launcher import Launcher
from tool_sandbox.metrics import Metrics
from tool_sandbox.places import Member, reason_to_recycle
from tool_sandbox.pool import Pool


class NoLauncher(Launcher):
    """The containers here need none."""

    async def connect(self) -> None: ...


class ObedientContainer(Container):
    """Two slots; every call is answered at once with `reply`, and its slot is clean."""

    made: "list[ObedientContainer]"
    reply = Reply("ok", "", "", 0.01, True)
    stopped = False

    async def start(self) -> None:
        ObedientContainer.made.append(self)
        self.free = {0, 1}

    async def stop(self) -> None:
        self.stopped = True
        await super().stop()

    def _send(self, **frame: Any) -> None:
        loop = asyncio.get_running_loop()
        if frame["op"] == "call":
            loop.call_soon(self._calls[frame["id"]].set_result, ObedientContainer.reply)
            if ObedientContainer.reply.ended:
                loop.call_soon(self._on_frame, {"op": "free", "slot": frame["slot"]})
        else:
            loop.call_soon(self._on_frame, {"op": "free", "slot": frame["slot"]})


@pytest.fixture(autouse=True)
def obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "Container", ObedientContainer)
    monkeypatch.setattr(pool_module, "Launcher", NoLauncher)
    monkeypatch.setattr(places, "RETIRE_CHECK_S", 0.01)
    ObedientContainer.made, ObedientContainer.reply = [], Reply("ok", "", "", 0.01, True)


async def run(pool: Pool, session_id: str | None = None, client: str = "") -> Any:
    return await pool.run("cold", "1", timeout_s=1.0, queue_s=5.0, session_id=session_id, client=client)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("calls", "violations", "age_s", "reason"),
    [
        (9, 2, 99.0, ""),
        (10, 0, 0.0, "calls"),
        (0, 3, 0.0, "violations"),
        (0, 0, 100.0, "age"),
        (10, 3, 100.0, "violations"),
    ],
)
def test_when_a_container_is_due(calls: int, violations: int, age_s: float, reason: str) -> None:
    config = SandboxConfig(recycle_after_calls=10, recycle_after_violations=3, recycle_after_s=100)
    never = SandboxConfig(recycle_after_calls=0, recycle_after_violations=0, recycle_after_s=0)
    member = Member(Container(Launcher(config), config, lambda c, s: None), 50.0, 100.0, calls, violations)
    assert reason_to_recycle(member, config, 50.0 + age_s) == reason
    assert reason_to_recycle(member, never, 50.0 + age_s) == ""


@pytest.mark.parametrize(
    ("status", "settings", "reason"),
    [
        ("ok", {"recycle_after_calls": 3}, "calls"),
        ("memory", {"recycle_after_violations": 3}, "violations"),
        ("output_limit", {"recycle_after_violations": 3}, "violations"),
        ("unavailable", {}, "unhealthy"),
    ],
)
async def test_a_due_container_is_replaced_and_then_stopped(status: str, settings: dict[str, int], reason: str) -> None:
    metrics = Metrics()
    pool = Pool(SandboxConfig(num_containers=1, num_spares=0, slots_per_container=2, **settings), metrics)  # type: ignore[arg-type]
    await pool.start()
    ObedientContainer.reply = Reply(status, "", "", 0.01, True)
    for _ in range(3 if settings else 1):
        assert (await run(pool)).status == status
    ObedientContainer.reply = Reply("ok", "", "", 0.01, True)
    await until(lambda: len(ObedientContainer.made) == 2 and ObedientContainer.made[0].stopped)
    assert not ObedientContainer.made[1].stopped
    assert (await run(pool)).status == "ok"
    stats = metrics.stats(draining=False)
    assert stats.containers_recycled == {reason: 1}
    assert stats.containers_died == 0
    assert stats.pool.containers == {"serving": 1, "spare": 0, "starting": 0, "retiring": 0}
    await pool.close()


async def test_a_due_container_waits_for_its_sessions_and_takes_no_new_ones() -> None:
    pool = Pool(SandboxConfig(num_containers=1, num_spares=0, slots_per_container=2, recycle_after_calls=2), Metrics())
    await pool.start()
    ObedientContainer.reply = Reply("ok", "", "", 0.01, False)  # cells, whose process lives on
    assert (await run(pool, "s")).fresh
    assert not (await run(pool, "s")).fresh  # the second call: it is due
    await until(lambda: pool.state().containers == {"serving": 1, "spare": 0, "starting": 0, "retiring": 1})
    assert not (await run(pool, "s")).fresh
    assert (await run(pool, "other")).fresh
    first, second = ObedientContainer.made
    assert (len(first.free), len(second.free), first.stopped) == (1, 1, False)
    pool._close_session(pool._sessions["s"])
    await until(lambda: first.stopped)
    assert (await run(pool, "s")).fresh
    await pool.close()


async def test_a_container_that_hangs_while_idle_is_found_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PROBE_IDLE_S", 0.0)
    monkeypatch.setattr(places, "PROBE_TIMEOUT_S", 0.05)
    monkeypatch.setattr("tool_sandbox.container.STOP_TIMEOUT_S", 0.05)
    metrics = Metrics()
    pool = Pool(SandboxConfig(num_containers=1, num_spares=0, slots_per_container=2), metrics)
    await pool.start()
    (hung,) = ObedientContainer.made
    monkeypatch.setattr(hung, "_send", lambda **frame: None)
    pool._places.sweep()
    await until(lambda: len(ObedientContainer.made) == 2)
    assert hung.dead
    assert metrics.stats(draining=False).containers_died == 1
    assert (await run(pool)).status == "ok"
    await pool.close()


async def test_ten_thousand_forgotten_sessions_leave_nothing_but_slots() -> None:
    """Each takes the slot of the one that idled longest; who comes back is told that the state is gone."""
    pool = Pool(SandboxConfig(num_containers=2, slots_per_container=2), Metrics())
    await pool.start()
    ObedientContainer.reply = Reply("ok", "", "", 0.01, False)
    for number in range(10_000):
        result = await run(pool, f"forgotten-{number}")
        assert (result.status, result.fresh) == ("ok", True)
    assert pool.state().sessions <= 4
    assert pool.state().queue == 0
    assert len(pool._sessions) <= 5
    assert (await run(pool, "forgotten-0")).fresh
    assert (await run(pool)).status == "ok"
    await pool.close()


async def test_a_busy_client_does_not_keep_another_waiting() -> None:
    """Fifty calls of one client wait when the only call of another comes: it is served among the first."""
    pool = Pool(SandboxConfig(num_containers=1, num_spares=0, slots_per_container=2), Metrics())
    await pool.start()
    order: list[str] = []

    async def call(client: str) -> None:
        await run(pool, client=client)
        order.append(client)

    tasks = [asyncio.create_task(call("busy")) for _ in range(50)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(call("other")))
    started = time.monotonic()
    await asyncio.gather(*tasks)
    assert "other" in order[:6]
    assert time.monotonic() - started < 60  # a hang, not a speed
    await pool.close()
