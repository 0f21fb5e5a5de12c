"""Measures the effect of each part of the method: arms with the same base, problems and budget, over several seeds.

    python -m benchmarks.arms [--seeds 5] [--config examples/tiny/run.toml] [key=value …]

    base          as it is
    sft-kept      fine-tuned on its own good trajectories
    sft           fine-tuned on those and on the accepted repairs
    grpo          from `sft`, rewarded for outcome and format
    grpo-rm       from `sft`, with the trajectory reward model
    grpo-rm-or    the same, with online repair and a reward model that is refreshed

Stages that arms share are done once a seed. What is done is kept in `--out`, so an interrupted measurement goes on. Prints
the accuracy on unseen problems, mean and 95 % interval over seeds (Student's t), and writes `arms.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autotraj.config.run import RunConfig, load, with_changes
from autotraj.config.stage_registry import REWARD_MODEL, SFT, SYNTHESIZE
from autotraj.interrupt import graceful_interrupt
from autotraj.launch import run_session
from autotraj.stages.pipeline import Pipeline, at_its_largest

ARMS = ("base", "sft-kept", "sft", "grpo", "grpo-rm", "grpo-rm-or")
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Degrees of freedom → Student's t for 95 % intervals."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval; the half-width is nan for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def run_seed(config: RunConfig, out: Path, console: Console) -> dict[str, Any]:
    """All arms of one seed; returns their evaluations by arm."""
    results: dict[str, Any] = {}
    with (
        graceful_interrupt() as interrupt,
        run_session(at_its_largest(with_changes(config, {"online_repair.enabled": True}))) as gateway,
    ):

        def pipeline(
            arm: str, changes: Mapping[str, Any], shared_from: str = "", shared: Sequence[str] = ()
        ) -> Pipeline:
            """An arm's run folder, in which the named stages are copied from another arm."""
            path = out / arm
            if shared_from and not (path / "stages.json").is_file():
                path.mkdir(parents=True, exist_ok=True)
                done = json.loads((out / shared_from / "stages.json").read_text())
                for stage in (SYNTHESIZE, SFT, REWARD_MODEL):
                    if stage.name in shared:
                        shutil.copytree(out / shared_from / stage.folder, path / stage.folder, dirs_exist_ok=True)
                        assert stage.name in done
                kept = {k: v for k, v in done.items() if k in (*shared, "base", "evaluate-base", "evaluate-sft")}
                if "sft" not in shared:
                    kept.pop("evaluate-sft", None)
                (path / "stages.json").write_text(json.dumps(kept))
            path.mkdir(parents=True, exist_ok=True)
            return Pipeline(with_changes(config, {"run_dir": str(path), **changes}), gateway, console, interrupt)

        full = pipeline("grpo-rm", {"online_repair.enabled": False})
        full.run()
        results["base"], results["sft"] = full.done["evaluate-base"], full.done["evaluate-sft"]
        results["grpo-rm"] = full.done["evaluate-grpo"]
        kept = pipeline(
            "sft-kept", {"sft.include_repaired": False, "stages": ["synthesize", "sft"]}, "grpo-rm", ["synthesize"]
        )
        kept.run()
        results["sft-kept"] = kept.done["evaluate-sft"]
        for arm, changes, shared in (
            ("grpo", {"stages": ["synthesize", "sft", "grpo"]}, ["synthesize", "sft"]),
            ("grpo-rm-or", {"online_repair.enabled": True}, ["synthesize", "sft", "reward-model"]),
        ):
            one = pipeline(arm, changes, "grpo-rm", shared)
            one.run()
            results[arm] = one.done["evaluate-grpo"]
    return results


def show(console: Console, by_seed: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title=f"accuracy on unseen problems, {len(by_seed)} seeds", title_justify="left")
    for heading in ("arm", "accuracy", "± 95 %", "reward", "tool calls", "each seed"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in ARMS:
        found = [results[arm] for results in by_seed.values()]
        mean, half = interval([entry["accuracy"] for entry in found])
        table.add_row(
            arm,
            f"{mean:.1%}",
            f"{half:.1%}",
            f"{statistics.fmean(entry['mean_reward'] for entry in found):.3f}",
            f"{statistics.fmean(entry['tool_call_rate'] for entry in found):.0%}",
            " ".join(f"{entry['accuracy']:.3f}" for entry in found),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--config", default="examples/tiny/run.toml")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/arms"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    console = Console()
    by_seed: dict[str, Any] = {}
    for seed in range(args.seeds):
        done = args.out / f"seed-{seed}" / "results.json"
        if not done.is_file():
            console.rule(f"seed {seed}")
            config = load(args.config, [*args.overrides, f"seed={seed}"])
            results = run_seed(config, done.parent, console)
            done.write_text(json.dumps(results, indent=2) + "\n")
        by_seed[str(seed)] = json.loads(done.read_text())
        show(console, by_seed)
    (args.out / "arms.json").write_text(json.dumps(by_seed, indent=2) + "\n")


if __name__ == "__main__":
    main()
