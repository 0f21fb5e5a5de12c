"""`python -m autotraj sandbox attack`: runs the attack suite against the configured containers and prints a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from autotraj.config.run import load_section
from autotraj.errors import UserError
from cluster.exit_codes import EXIT_FAILED, EXIT_OK
from tool_sandbox import build
from tool_sandbox.attacks.attack import Attack
from tool_sandbox.attacks.on_gateway import CLIENTS, ClientAttack
from tool_sandbox.attacks.run import ATTACKS, NEIGHBOUR_TIMEOUT_S, AttackResult, middle, run_all, settings_for
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import SandboxError

Attacks = tuple[Attack | ClientAttack, ...]


def attack(config_path: str | None, overrides: Sequence[str], attacks: Attacks | None = None) -> int:
    """Run `attacks` (default: all of them) and print the result of each. Returns 1 if one succeeded."""
    config = load_section(SandboxConfig, "sandbox", config_path, overrides)
    attacks = (*ATTACKS, *CLIENTS) if attacks is None else attacks
    settings = settings_for(config)
    console = Console(width=max(150, Console().width))
    where = "two slots of one container" if settings.slots_per_container > 1 else "a container each"
    console.print(f"{len(attacks)} attacks on {build.resolve_image(settings)}; attack and neighbour: {where} …")
    outcomes: list[AttackResult] = []
    idle_ms: tuple[float, ...] = ()
    try:
        for came in run_all(config, attacks):
            if isinstance(came, AttackResult):
                outcomes.append(came)
            else:
                idle_ms = came
    except SandboxError as error:
        raise UserError(str(error)) from error
    console.print(table(outcomes, idle_ms))
    breached = [outcome for outcome in outcomes if not outcome.held]
    for outcome in breached:
        for problem in outcome.problems:
            console.print(f"{outcome.attack.name}: {problem}", markup=False)
    console.print(f"{len(outcomes) - len(breached)} of {len(outcomes)} attacks came to nothing")
    return EXIT_FAILED if breached else EXIT_OK


def table(outcomes: Sequence[AttackResult], idle_ms: tuple[float, ...]) -> Table:
    rows = Table(
        caption=f"neighbour without an attack: p50 {middle(idle_ms):.0f} ms, slowest {max(idle_ms):.0f} ms; a call "
        f"of its that is answered wrongly, or not within {NEIGHBOUR_TIMEOUT_S:.0f} s, makes an attack a success"
    )
    for heading in ("attack", "what it tried", "ended", "outcome", "neighbour p50 / slowest", "next call"):
        rows.add_column(heading)
    for outcome in outcomes:
        latencies = outcome.neighbour_ms
        rows.add_row(
            outcome.attack.name,
            outcome.attack.tries,
            f"{outcome.status}, {outcome.duration_s:.1f} s",
            "held" if outcome.held else "BREACHED",
            f"{middle(latencies):.0f} / {max(latencies):.0f} ms",
            "clean" if outcome.clean else "NOT CLEAN",
        )
    return rows
