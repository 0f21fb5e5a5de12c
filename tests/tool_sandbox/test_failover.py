"""Several gateways behind one client: real ones that are killed and stopped, small ones in this process that are full."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from own_gateways import StandIn, StartGateway

from tool_sandbox import failover
from tool_sandbox.client import AsyncSandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.failover import FailoverClient, Site
from tool_sandbox.local import LocalGateway
from tool_sandbox.server import Gateway
from trajectory.types import ToolResult

pytestmark = pytest.mark.slow

SMALL = SandboxConfig(num_containers=1, slots_per_container=2, memory_mib=128, scratch_mib=16, start_timeout_s=120)


@pytest.fixture
def two() -> Iterator[tuple[LocalGateway, LocalGateway]]:
    with ThreadPoolExecutor(2) as threads:
        starting = [threads.submit(LocalGateway, SMALL) for _ in range(2)]
    with starting[0].result() as first, starting[1].result() as second:
        yield first, second


def sites(*gateways: LocalGateway | Gateway) -> list[Site]:
    return [Site(gateway.address, f"node{number}") for number, gateway in enumerate(gateways)]


# --- real gateways that fail --------------------------------------------------------------------------------------------


@pytest.mark.docker
async def test_calls_go_on_elsewhere_when_a_gateway_is_killed_under_load(
    two: tuple[LocalGateway, LocalGateway],
) -> None:
    first, second = two
    results: dict[int, ToolResult] = {}
    async with FailoverClient(sites(first, second), here="node0") as client:

        async def call(number: int) -> None:
            results[number] = await client.call(
                "python", f"import time; time.sleep(0.1); print({number})", timeout_s=20
            )

        calls = [asyncio.create_task(call(number)) for number in range(40)]
        for finished in asyncio.as_completed(calls[:4]):
            await finished
        assert not all(task.done() for task in calls)
        os.kill(first.pid, signal.SIGKILL)
        await asyncio.wait_for(asyncio.gather(*calls), 120)
        assert {n: (r.status, r.output) for n, r in results.items()} == {n: ("ok", f"{n}\n") for n in range(40)}

        session = await client.call("python", "x = 1", session_id="s", timeout_s=20)
        assert (session.status, session.fresh) == ("ok", True), session.message


@pytest.mark.docker
async def test_a_gateway_that_hangs_is_noticed_within_the_deadline_and_the_call_goes_on_elsewhere(
    two: tuple[LocalGateway, LocalGateway],
) -> None:
    first, second = two
    async with (
        FailoverClient(sites(first, second), here="node0") as client,
        AsyncSandboxClient(second.address) as beside,
    ):
        assert (await client.call("python", "print(1)", timeout_s=20)).status == "ok"
        # A call that is silent for longer than the signs of life are apart, on one that lives: it isn't hung up on.
        long = asyncio.create_task(beside.call("python", "import time; time.sleep(22); print('done')", timeout_s=40))
        os.kill(first.pid, signal.SIGSTOP)  # its connections stay open, and nobody reads them
        try:
            started = time.monotonic()
            result = await client.call("python", "print(2)", timeout_s=5)
            waited = time.monotonic() - started
            assert (result.status, result.output) == ("ok", "2\n"), result.message
            assert 1.0 < waited < 35.0  # when the sign of life doesn't come, not at the deadline of 40 s
            again = time.monotonic()
            results = await asyncio.gather(*(client.call("python", f"print({n})", timeout_s=5) for n in range(6)))
            assert [r.output for r in results] == [f"{n}\n" for n in range(6)]
            assert time.monotonic() - again < 35.0
            assert (await long).output == "done\n", (await long).message
        finally:
            os.kill(first.pid, signal.SIGCONT)


@pytest.mark.docker
async def test_a_session_stays_on_its_gateway_and_says_when_it_was_lost(
    two: tuple[LocalGateway, LocalGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    sooner = [("grpc.keepalive_time_ms", 1000), ("grpc.http2.ping_timeout_ms", 3000)]
    monkeypatch.setattr("tool_sandbox.client._OPTIONS", sooner)

    async def cell(code: str) -> tuple[str, str, bool]:
        result = await client.call("python", code, session_id="counts", timeout_s=20)
        return result.status, result.output, result.fresh

    async with FailoverClient(sites(first, second), here="node0") as client:
        assert await cell("x = 1") == ("ok", "", True)
        assert await cell("x += 1; print(x)") == ("ok", "2\n", False)
        os.kill(first.pid, signal.SIGSTOP)
        try:  # its process is alive there, with x = 2, and must not be taken for the session again
            status, output, fresh = await cell("print('x' in globals()); x = 10")
            assert (status, output, fresh) == ("ok", "False\n", True)
        finally:
            os.kill(first.pid, signal.SIGCONT)
        await asyncio.sleep(2 * failover.FIRST_REST_S)
        assert await cell("x += 1; print(x)") == ("ok", "11\n", False)
        os.kill(second.pid, signal.SIGKILL)
        assert await cell("print('x' in globals())") == ("ok", "False\n", True)  # back on the first: anew all the same


# --- gateways of this process, and ports that are none --------------------------------------------------------------------


class ScriptedTool(StandIn):
    """Answers `unavailable` as often as told, and counts."""

    def __init__(self, name: str) -> None:
        self.name, self.num_full, self.num_calls, self.sessions = name, 0, 0, list[str | None]()

    async def run(self, content: str, *, session_id: str | None, **_: Any) -> ToolResult:
        self.num_calls += 1
        self.sessions.append(session_id)
        if self.num_calls <= self.num_full:
            return ToolResult(status="unavailable", message="full", retry_after_s=0.3)
        if content == "break":
            raise RuntimeError("a defect that this one content meets")
        return ToolResult(status="ok", output=self.name)


Started = tuple[ScriptedTool, Gateway]


@pytest.fixture
async def scripted(start_gateway: StartGateway) -> list[Started]:
    tools = [ScriptedTool("a"), ScriptedTool("b")]
    return [(tool, await start_gateway(tool, token="t", drain_s=0.0)) for tool in tools]


async def test_the_nearest_is_asked_first_and_the_next_when_it_is_full(scripted: list[Started]) -> None:
    (a, first), (b, second) = scripted
    async with FailoverClient(sites(first, second), here="node1", token="t") as client:
        assert [(await client.call("echo", "")).output for _ in range(5)] == ["b"] * 5
        b.num_full = 6
        assert (await client.call("echo", "")).output == "a"
    assert (a.num_calls, b.num_calls) == (1, 6)


async def test_when_all_are_full_the_hint_is_waited_for(scripted: list[Started]) -> None:
    (a, first), (b, second) = scripted
    a.num_full = b.num_full = 2
    async with FailoverClient(sites(first, second), token="t", queue_timeout_s=20.0) as client:
        started = time.monotonic()
        result = await client.call("echo", "")
    assert result.status == "ok", result.message
    assert time.monotonic() - started >= 0.5  # two hints of 0.3 s, the second begun a little later
    assert a.num_calls + b.num_calls == 5


async def test_the_deadline_bounds_all_tries_and_the_result_tells_of_them(
    scripted: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, first), (b, second) = scripted
    a.num_full = b.num_full = 10**6
    monkeypatch.setattr("tool_sandbox.failover.MARGIN_S", 1.0)
    async with FailoverClient(sites(first, second), token="t", queue_timeout_s=1.0) as client:
        started = time.monotonic()
        result = await client.call("echo", "", timeout_s=1.0)
    assert result.status == "unavailable"
    assert f"full (tries: {a.num_calls + b.num_calls}; gateways known: {first.address}" in result.message
    assert 1.0 < time.monotonic() - started < 30.0  # of 1 + 1 + 1 s, what a retry could still use


async def test_a_session_opens_where_there_is_room_and_its_own_gateways_no_is_final(scripted: list[Started]) -> None:
    (a, first), (b, second) = scripted
    a.num_full = 1
    async with FailoverClient(sites(first, second), here="node0", token="t") as client:
        assert (await client.call("echo", "", session_id="s")).output == "b"
        b.num_full = 2
        assert (await client.call("echo", "", session_id="s")).status == "unavailable"
        assert (await client.call("echo", "", session_id="s")).output == "b"
    assert (a.sessions, b.sessions) == (["s"], ["s#1"] * 3)


async def test_a_call_that_breaks_every_gateway_ends_and_hurts_no_other(
    scripted: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, first), (b, second) = scripted
    monkeypatch.setattr("tool_sandbox.failover.MARGIN_S", 1.0)
    async with FailoverClient(sites(first, second), token="t", queue_timeout_s=1.0) as client:
        broken, fine = await asyncio.gather(client.call("echo", "break", timeout_s=1.0), client.call("echo", ""))
        assert (broken.status, fine.status) == ("unavailable", "ok")
    assert a.num_calls + b.num_calls < 40


async def test_a_wrong_token_is_told_at_once(scripted: list[Started]) -> None:
    async with FailoverClient(sites(*(g for _, g in scripted)), token="wrong") as client:
        result = await asyncio.wait_for(client.call("echo", ""), 20)
    assert result.status == "rejected"
    assert "refused the token" in result.message


@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "never-speaks"])
async def test_a_port_without_a_gateway_costs_little(scripted: list[Started], listens: bool) -> None:
    _, (_, second) = scripted
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listens:
            other.listen()
        here = Site(f"127.0.0.1:{other.getsockname()[1]}", "here")
        async with FailoverClient([here, *sites(second)], here="here", token="t") as client:
            started = time.monotonic()
            assert (await client.call("echo", "")).output == "b"
            assert time.monotonic() - started < 30.0
            started = time.monotonic()
            assert (await client.call("echo", "")).output == "b"  # the other one rests
            assert time.monotonic() - started < 30.0


async def test_the_list_may_change_while_calls_wait(scripted: list[Started]) -> None:
    (_, first), (_, second) = scripted
    async with FailoverClient(token="t") as client:
        waits = asyncio.create_task(client.call("echo", ""))
        await asyncio.sleep(0.1)
        client.set_gateways(sites(first))
        assert (await asyncio.wait_for(waits, 20)).output == "a"
        client.set_gateways([Site(second.address, "node1")])
        assert (await client.call("echo", "")).output == "b"
        assert [site.address for site in client.gateways] == [second.address]


async def test_a_call_on_a_gateway_that_leaves_the_list_is_not_cut_off(
    scripted: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, first), (_, second) = scripted
    answer: Callable[..., object] = a.run
    may_answer = asyncio.Event()

    async def run(*args: object, **kwargs: object) -> object:
        await may_answer.wait()
        return await answer(*args, **kwargs)  # type: ignore[misc]

    monkeypatch.setattr(a, "run", run)
    async with FailoverClient(sites(first, second), here="node0", token="t") as client:
        waits = asyncio.create_task(client.call("echo", ""))
        await asyncio.sleep(0.5)
        client.set_gateways([Site(second.address, "node1")])
        await asyncio.sleep(0.1)
        may_answer.set()
        assert (await asyncio.wait_for(waits, 20)).output == "a"


def test_the_rest_of_a_gateway_grows_with_failures_in_a_row_not_with_calls_that_fail_together() -> None:
    gateway = failover._Gateway(Site("x:1"), client=None)  # type: ignore[arg-type]
    rests, now = [], 0.0
    for _ in range(9):
        for _ in range(50):
            gateway.didnt_answer(now)
        rests.append(gateway.rests_until - now)
        now = gateway.rests_until
    assert rests == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    gateway.answered(ToolResult(status="ok"), now)
    gateway.didnt_answer(now)
    assert gateway.rests_until - now == 0.5
