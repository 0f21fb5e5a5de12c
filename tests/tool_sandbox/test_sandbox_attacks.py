"""The attack suite against real containers: none succeeds, none reaches its neighbour, none leaves anything behind."""

from collections.abc import Iterator

import pytest

from tool_sandbox.attacks import on_gateway, run
from tool_sandbox.attacks.attack import Attack
from tool_sandbox.attacks.on_gateway import CLIENTS, ClientAttack
from tool_sandbox.attacks.run import ATTACKS, Range, differences, judge, settings_for
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import LocalGateway
from trajectory.types import ToolResult


@pytest.fixture(scope="module")
def shared() -> Iterator[Range]:
    """Attack and neighbour in one container."""
    config = settings_for(SandboxConfig(memory_mib=256, scratch_mib=16, start_timeout_s=120, token="t", max_queue=200))
    with LocalGateway(config) as gateway, SandboxClient(gateway.address, token="t") as client:
        yield Range(client, "t")


@pytest.mark.docker
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_an_attack_comes_to_nothing(shared: Range, attack: Attack) -> None:
    outcome = shared.run(attack)
    assert outcome.problems == ()
    assert outcome.clean
    assert outcome.neighbour_ms


@pytest.mark.docker
@pytest.mark.parametrize("attack", CLIENTS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_a_hostile_client_comes_to_nothing(
    shared: Range, attack: ClientAttack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two hundred forgotten sessions: ten thousand are in test_recycling, and in `sandbox attack`."""
    monkeypatch.setattr(on_gateway, "NUM_SESSIONS", 200)
    outcome = shared.run(attack)
    assert outcome.problems == ()
    assert outcome.clean
    assert outcome.neighbour_ms


@pytest.mark.docker
def test_a_neighbour_that_waits_too_long_is_told(shared: Range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "NEIGHBOUR_TIMEOUT_S", 0.02)  # its code alone takes longer
    outcome = shared.run(ClientAttack("a", "nothing", lambda target: []))
    assert any("neighbour" in problem for problem in outcome.problems)


@pytest.mark.docker
def test_an_attack_that_succeeds_is_told(shared: Range) -> None:
    """Code that does what is allowed, and calls it a breach; that ends otherwise than it says; that stops half-way."""
    allowed = Attack(
        "a", "reads its own status", "attempt('read', lambda: open('/proc/self/status').read(1)); print('end')"
    )
    assert shared.run(allowed).problems == ("BREACH read 'N'",)
    assert "it ended error" in shared.run(Attack("b", "fails", "1 / 0; print('end')")).problems[0]
    assert "did not come to its end" in shared.run(Attack("c", "stops", "sys.exit(0); print('end')")).problems[0]


def test_what_is_judged() -> None:
    attack = Attack("name", "tries", "print('end')")
    assert judge(attack, ToolResult(status="ok", output="end\n"), "secret") == []
    assert judge(attack, ToolResult(status="ok", output="secret end\n"), "secret") == ["it read the neighbour's secret"]
    before: dict[int, dict[str, object]] = {1: {"files": []}, 2: {"files": []}}
    assert list(differences(before, {1: {"files": []}, 2: {"files": ["x"]}})) == [
        "the next call found files: ['x'], not []"
    ]
    assert list(differences(before, {3: {"files": []}, 4: {"files": []}})) == ["its container did not survive"]


def test_the_names_of_attacks_are_unique() -> None:
    names = [attack.name for attack in (*ATTACKS, *CLIENTS)]
    assert len(set(names)) == len(names)


def test_where_slots_share_no_container_attack_and_neighbour_do_not() -> None:
    strict = settings_for(SandboxConfig(slots_per_container=1, num_containers=8))
    assert (strict.num_containers, strict.slots_per_container) == (2, 1)
    shared = settings_for(SandboxConfig(slots_per_container=4, num_containers=8, token="t"))
    assert (shared.num_containers, shared.slots_per_container, shared.token) == (1, 2, "t")
