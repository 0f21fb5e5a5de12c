"""Compares trained trajectories per second with TRL 1.16's `GRPOTrainer`: same model, prompts, limits and machine.

    python -m benchmarks.vs_trl [--no-tools | --tools] [--steps 20] [--rounds 2]

A step is 16 problems × 8 trajectories. Each side runs in a process of its own, in turn, so that a noisy machine hits both;
each may use every core, and TRL gets whichever of one or two threads suits it. Start-up and the first steps aren't counted.
With tools, every call first waits for a drawn latency (`benchmarks.tool_latency`: median 0.5 s, cut at 5 s); ours then runs
in the real sandbox, TRL's is evaluated in its own process. `benchmarks.trl_side` says how TRL runs tools and how it is set.

Both sides do equal work. They sample at temperature 1 from the same weights and stop at the same strings. The learning rate
is too small to change the weights much, so lengths and calls per trajectory agree, as the table shows. Rewards are the
outcome and a small random number, so that every group has variance and both sides train on every trajectory. The loops
differ: ours samples while it trains (`grpo.max_staleness = 1`), TRL samples and trains in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autotraj.config.run import RunConfig, load

MODEL = "examples/tiny/base"
GROUPS_PER_STEP, GROUP_SIZE = 16, 8
TRAJECTORIES_PER_STEP = GROUPS_PER_STEP * GROUP_SIZE
MAX_TOOL_CALLS = 3
LR = 1e-6
MAX_RESPONSE_TOKENS = {"none": 90, "tools": 160, "rollout_func": 160}
"""On both sides this includes the tools' results."""

WAYS = tuple(MAX_RESPONSE_TOKENS)
OUT = Path("runs/bench/vs_trl.json")
SIDE_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One side's figures, over steps after the warm-up."""

    system: str
    way: str
    step_seconds: list[float]
    tokens_per_trajectory: float  # that the model wrote
    tool_calls_per_trajectory: float
    threads: int

    @property
    def trajectories_per_second(self) -> float:
        return TRAJECTORIES_PER_STEP * len(self.step_seconds) / sum(self.step_seconds)

    def report(self, out: str | None) -> None:
        """Prints the figures, and writes them to `out` as JSON."""
        print(f"{self.system}, {self.way}, {self.threads} threads: {self.trajectories_per_second:.1f} trajectories/s")
        print("seconds a step: " + " ".join(f"{s:.2f}" for s in self.step_seconds), flush=True)
        if out:
            Path(out).write_text(json.dumps(asdict(self)))


def run_config(way: str) -> RunConfig:
    """Our settings for the workload; the other side reads its limits from here, too."""
    return load(
        "examples/tiny/grpo.toml",
        [
            f"model={MODEL}",
            f"grpo.groups_per_step={GROUPS_PER_STEP}",
            f"rollout.group_size={GROUP_SIZE}",
            f"episode.max_response_tokens={MAX_RESPONSE_TOKENS[way]}",
            f"episode.max_tool_calls={0 if way == 'none' else MAX_TOOL_CALLS}",
            f"learner.lr={LR}",
            "learner.micro_batch_tokens=2048",  # fits the cache, as TRL's micro-batches do
        ],
    )


def measure_autotraj(way: str, *, steps: int, warmup: int) -> Measured:
    """Trains `warmup + steps` steps and times the last `steps`."""
    import random

    from autotraj.launch import run_session
    from autotraj.loop import grpo
    from autotraj.loop.grpo import GRPOConfig
    from autotraj.sampling.scoring import score_group
    from benchmarks.tool_latency import SlowToolActor
    from rewards.config import RewardConfig
    from trajectory.types import Group

    def score(group: Group, config: RewardConfig) -> Group:
        scored = score_group(group, config)
        rewards = tuple(replace(reward, total=reward.total + random.random() / 100) for reward in scored.rewards)
        return replace(scored, rewards=rewards)

    grpo.score_group = score
    config = run_config(way)
    seconds, metrics = [], []
    with run_session(config) as gateway:
        settings = GRPOConfig().run(config, sandbox_address=gateway.address, sandbox_token=gateway.token)
        algo = settings.env_runners(env_runner_cls=SlowToolActor).build_algo()
        try:
            for _ in range(warmup + steps):
                started = time.perf_counter()
                metrics.append(algo.train()["grpo"])
                seconds.append(time.perf_counter() - started)
        finally:
            algo.stop()
    counted = metrics[warmup:]
    assert all(m["num_trajectories"] == TRAJECTORIES_PER_STEP and not m["groups_no_variance"] for m in counted)
    return Measured(
        system="AutoTraj",
        way=way,
        threads=config.engine.cpu_threads + config.learner.num_cpus_per_learner,
        step_seconds=seconds[warmup:],
        tokens_per_trajectory=statistics.mean(m["generated_tokens_mean"] for m in counted),
        tool_calls_per_trajectory=statistics.mean(m["tool_calls_mean"] for m in counted),
    )


def in_own_process(module: str, way: str, *options: str) -> Measured:
    """One side's figures; its output goes to a log beside ours."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    side = OUT.parent / f"{module.rsplit('.')[-1]}-{way}"
    command = [sys.executable, "-m", module, way, *options, "--out", str(side.with_suffix(".json"))]
    # By default TRL's two threads spin while they wait for each other: six times slower if anything else runs.
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    with side.with_suffix(".log").open("w") as log:
        try:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env, check=True, timeout=SIDE_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{' '.join(command)} ended with {error.returncode}; the last lines are in {log.name}")
    return Measured(**json.loads(side.with_suffix(".json").read_text()))


def compare(way: str, *, steps: int, trl_steps: int, rounds: int, console: Console) -> list[Measured]:
    """Both sides in turn, `rounds` times; TRL with one and two threads first, then with the better."""
    measured: list[Measured] = []

    def add(one: Measured) -> None:
        measured.append(one)
        console.print(
            f"{one.system} ({one.way}, {one.threads} threads): {one.trajectories_per_second:.2f} trajectories/s"
        )

    baselines = ("none",) if way == "none" else ("tools", "rollout_func")
    for i in range(rounds):
        add(in_own_process("benchmarks.vs_trl", way, "--side", f"--steps={steps}"))
        for baseline in baselines:
            # Tool calls one after another take minutes a step whatever the threads do: two, and few steps.
            few = baseline == "tools"
            best = max(
                (m for m in measured if m.way == baseline and m.system != "AutoTraj"),
                key=lambda m: m.trajectories_per_second,
                default=None,
            )
            for threads in (2,) if few else (1, 2) if i == 0 or best is None else (best.threads,):
                num = min(trl_steps, 2) if few else trl_steps
                add(in_own_process("benchmarks.trl_side", baseline, f"--threads={threads}", f"--steps={num}"))
    return measured


def show(measured: Sequence[Measured], console: Console) -> list[dict[str, float | str]]:
    """Prints the table: medians over rounds, TRL's better thread setting. Returns its rows."""
    table = Table(title="trained trajectories per second", title_justify="left")
    for heading in (
        "tools",
        "system",
        "threads",
        "trajectories/s",
        "tokens/s",
        "tokens each",
        "calls each",
        "ours / it",
    ):
        table.add_column(heading, justify="left" if heading in ("tools", "system") else "right")
    rows: list[dict[str, float | str]] = []
    settings: dict[tuple[str, str, int], list[Measured]] = {}
    for one in measured:
        settings.setdefault((one.system, one.way, one.threads), []).append(one)
    for way in dict.fromkeys(m.way for m in measured):
        ours_way = "none" if way == "none" else "tools"
        for system in ("AutoTraj", "TRL 1.16"):
            runs = [m for (s, w, _), m in settings.items() if (s, w) == (system, way)]
            if not runs:
                continue
            best = max(runs, key=_median)
            rate, tokens = _median(best), statistics.fmean(m.tokens_per_trajectory for m in best)
            ours = next(_median(m) for (s, w, _), m in settings.items() if (s, w) == ("AutoTraj", ours_way))
            row: dict[str, float | str] = {
                "tools": {"none": "no", "tools": "yes", "rollout_func": "yes, own rollout_func"}[way],
                "system": system,
                "threads": best[0].threads,
                "trajectories_per_second": round(rate, 2),
                "tokens_per_second": round(rate * tokens, 1),
                "tokens_per_trajectory": round(float(tokens), 1),
                "tool_calls_per_trajectory": round(statistics.fmean(m.tool_calls_per_trajectory for m in best), 2),
                "ours_over_it": round(ours / rate, 2),
            }
            rows.append(row)
            table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    return rows


def _median(runs: Sequence[Measured]) -> float:
    return statistics.median(m.trajectories_per_second for m in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tools", action=argparse.BooleanOptionalAction, default=None, help="only with, or only without"
    )
    parser.add_argument("--steps", type=int, default=20, help="ours, and TRL's without tools")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("way", nargs="?", choices=("none", "tools"), help=argparse.SUPPRESS)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warmup", type=int, default=3, help="steps that aren't counted")
    parser.add_argument("--out", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure_autotraj(args.way, steps=args.steps, warmup=args.warmup).report(args.out)
        return
    console = Console()
    console.width = max(console.width, 110)  # the table's
    measured: list[Measured] = []
    for way in ("none", "tools") if args.tools is None else ("tools",) if args.tools else ("none",):
        steps = max(2, args.steps // 2)
        measured += compare(way, steps=args.steps, trl_steps=steps, rounds=args.rounds, console=console)
    rows = show(measured, console)
    OUT.write_text(json.dumps({"table": rows, "runs": [asdict(m) for m in measured]}, indent=1) + "\n")
    console.print(f"figures: {OUT}; logs beside it")


if __name__ == "__main__":
    main()
