"""`make demo`: the whole method on the embedded tiny model, with all real parts, in minutes on two cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from actors.repair.types import WRONG_ANSWER
from autotraj.cli.commands import run_all
from autotraj.config.run import load
from autotraj.run_folder.lock import clear, locked
from cluster.exit_codes import EXIT_OK
from trajectory.log import read_log
from trajectory.types import Group, Reward, Trajectory

CONFIG = "examples/tiny/run.toml"


def main(seed: int, run_dir: str) -> int:
    """Run the pipeline from the start and show a repair, a successful and a failed trajectory, and the figures."""
    console = Console()
    config = load(CONFIG, [f"seed={seed}", f'run_dir="{run_dir}"'])
    with locked(config.folder):
        clear(config.folder)  # a demo always starts from the beginning
    code = run_all(config, console)
    if code == EXIT_OK:
        show(console, config.folder)
    return code


def show(console: Console, path: Path) -> None:
    """Show a finished run on a terminal."""
    summary = json.loads((path / "summary.json").read_text())
    names = [stage["name"] for stage in summary["stages"]]
    console.print()
    if (repair := _repair(path)) is not None:
        console.print(
            _panel("repaired (before)", repair["question"], repair["original"], ", ".join(repair["problems"]))
        )
        after = f"quality {repair['quality_before']['score']:.2f} → {repair['quality_after']['score']:.2f}"
        console.print(_panel("repaired (after)", "", repair["repaired"], after))
    for title, correct, name in (("won", True, names[-1]), ("lost", False, names[0])):
        found = _example(list(read_log(path / f"samples/{name}.log")), correct)
        if found:
            question, trajectory, reward = found
            parts = ", ".join(f"{part} {value:+.2f}" for part, value in reward.parts.items())
            note = f"reward {reward.total:.2f} = {parts}; ended by {trajectory.finish_reason}"
            console.print(_panel(f"{title} ({name})", question, trajectory.text, note))
    console.print(_table(summary))
    console.print(
        f"{summary['total_seconds']:.0f} s in all. Look at {path / 'report.html'}; trained policy: {path / 'grpo/policy'}",
        soft_wrap=True,
    )


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title="AutoTraj demo", title_justify="left")
    for heading in ("stage", "accuracy", "± 95 %", "problems", "tool calls", "reward", "seconds"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in summary["stages"]:
        table.add_row(
            stage["name"],
            f"{stage['accuracy']:.1%}",
            f"{stage['accuracy_ci95']:.1%}",
            str(stage["num_problems"]),
            f"{stage['tool_call_rate']:.0%}",
            f"{stage['mean_reward']:.2f}",
            f"{stage['seconds']:.0f}",
        )
    return table


def _repair(path: Path) -> dict[str, Any] | None:
    """A repair to show, of a wrong answer if there is one."""
    lines = (path / "synthesis/repairs.jsonl").read_text().splitlines()
    accepted = [repair for line in lines if (repair := json.loads(line))["repaired"]]
    return max(accepted, key=lambda repair: WRONG_ANSWER in repair["problems"], default=None)


def _example(groups: list[Group], correct: bool) -> tuple[str, Trajectory, Reward] | None:
    """A trajectory to show, one with a tool call if there is one, as that is more instructive."""
    pairs = [
        (group.task.question, trajectory, reward)
        for group in groups
        for trajectory, reward in zip(group.trajectories, group.rewards, strict=True)
        if reward.correct is correct
    ]
    return max(pairs, key=lambda pair: pair[1].num_tool_calls, default=None)


def _panel(title: str, question: str, text: str, note: str) -> Panel:
    # `Text` and not markup, since a model's output is hostile, also to a terminal library.
    body = Text(question + "\n\n" if question else "", style="bold")
    body.append(Text(text.strip()))
    body.append(f"\n\n{note}", style="dim")
    return Panel(body, title=title, title_align="left")
