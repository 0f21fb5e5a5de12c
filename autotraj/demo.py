"""`make demo`: the method on the embedded tiny model, with every real part, in a few minutes on two cores."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autotraj import preflight
from autotraj.config import load
from autotraj.evaluate import EvalResult
from autotraj.launch import build, measure, parts, train
from autotraj.progress import ProgressView
from autotraj.run_folder import RunFolder
from trajectory.types import Reward, Trajectory

CONFIG = "examples/tiny/grpo.toml"


def main(*, seed: int, run_dir: str) -> int:
    """Evaluates the base, trains it with GRPO and tools, evaluates again; `summary.json` holds the figures."""
    console = Console()
    started = time.monotonic()
    config = load(CONFIG, [f"seed={seed}", f'run_dir="{run_dir}"'])
    _, tasks = preflight.check(config)
    shutil.rmtree(run_dir, ignore_errors=True)  # a demo starts over
    with RunFolder.create(config) as folder, parts(config) as gateway:
        console.print(
            f"[bold]AutoTraj demo[/bold]: {config.model}, {len(tasks)} unseen problems, {config.grpo.num_steps} steps of "
            f"{config.grpo.groups_per_step} problems × {config.rollout.group_size} trajectories; run folder {folder.path}",
            soft_wrap=True,
        )
        console.print("starting vLLM, DeepSpeed and the sandbox …")
        algo = build(config, gateway, trajectory_log=folder.trajectory_log)
        try:
            console.print(f"up after {time.monotonic() - started:.0f} s; evaluating the base …")
            stages = [measure("base", algo, config, tasks)]
            console.print(_line(stages[0]))
            with ProgressView(config.grpo.num_steps, console=console) as view:
                train_started = time.monotonic()
                complete = train(algo, folder, num_steps=config.grpo.num_steps, on_step=view.step)
                train_seconds = time.monotonic() - train_started
            stages.append(measure("grpo", algo, config, tasks))
            console.print(_line(stages[1]))
            algo.learner_group.export_hf(str((folder.path / "policy").resolve()))
        finally:
            algo.stop()
        total = time.monotonic() - started
        folder.write_json(
            "summary.json",
            {"stages": [_stage(stages[0], 0.0), _stage(stages[1], train_seconds)], "total_seconds": round(total, 1)},
        )
        _report(console, stages, train_seconds, total, folder.path)
    return 0 if complete else 130


def _stage(result: EvalResult, train_seconds: float) -> dict[str, float | str | int]:
    """One entry of `summary.json`; `seconds` is the stage's training and its evaluation."""
    return {
        "name": result.name,
        "accuracy": round(result.accuracy, 4),
        "num_problems": result.num_problems,
        "tool_call_rate": round(result.tool_call_rate, 4),
        "mean_reward": round(result.mean_reward, 4),
        "seconds": round(train_seconds + result.seconds, 1),
    }


def _line(result: EvalResult) -> str:
    return (
        f"{result.name}: accuracy {result.accuracy:.1%} ± {result.accuracy_ci95:.1%}, tool-call rate "
        f"{result.tool_call_rate:.0%} ({result.seconds:.0f} s)"
    )


def _report(console: Console, stages: list[EvalResult], train_seconds: float, total: float, path: Path) -> None:
    console.print()
    for title, correct in (("won", True), ("lost", False)):
        found = _example(stages[-1] if correct else stages[0], correct)
        if found:
            question, trajectory, reward = found
            console.print(_trajectory_panel(title, question, trajectory, reward, stages[-1 if correct else 0].name))
    table = Table(title="AutoTraj demo", title_justify="left")
    for heading in ("stage", "accuracy", "± 95 %", "problems", "tool calls", "reward", "seconds"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for result, seconds in zip(stages, (0.0, train_seconds), strict=True):
        table.add_row(
            result.name,
            f"{result.accuracy:.1%}",
            f"{result.accuracy_ci95:.1%}",
            str(result.num_problems),
            f"{result.tool_call_rate:.0%}",
            f"{result.mean_reward:.2f}",
            f"{seconds + result.seconds:.0f}",
        )
    console.print(table)
    console.print(f"{total:.0f} s in all. Figures: {path / 'summary.json'}. Trained policy: {path / 'policy'}.")


def _example(result: EvalResult, correct: bool) -> tuple[str, Trajectory, Reward] | None:
    """A trajectory to show; a lost one with a tool call, if there is one, as it tells more."""
    pairs = [
        (group.task.question, trajectory, reward)
        for group in result.groups
        for trajectory, reward in zip(group.trajectories, group.rewards, strict=True)
        if reward.correct is correct
    ]
    return max(pairs, key=lambda pair: pair[1].num_tool_calls > 0, default=None)


def _trajectory_panel(title: str, question: str, trajectory: Trajectory, reward: Reward, stage: str) -> Panel:
    # `Text`, not markup: a model's output is hostile, also to a terminal library.
    body = Text(question + "\n\n", style="bold")
    body.append(Text(trajectory.text.strip()))
    parts_text = ", ".join(f"{name} {value:+.2f}" for name, value in reward.parts.items())
    body.append(f"\n\nreward {reward.total:.2f} = {parts_text}; ended by {trajectory.finish_reason}", style="dim")
    return Panel(body, title=f"{title} ({stage})", title_align="left")
