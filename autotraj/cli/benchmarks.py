"""`evaluate --benchmarks` and `compare`: measure a checkpoint on a suite of benchmark files, and show runs side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from autotraj.config.benchmarks import BenchmarkSuite, load_suite
from autotraj.config.run import load, with_changes
from autotraj.errors import UserError
from autotraj.evaluation.benchmarks import BenchmarkResult, benchmark_result
from autotraj.evaluation.comparison import comparison_table
from autotraj.evaluation.endings import explain
from autotraj.interrupt import graceful_interrupt
from autotraj.planning import preflight
from autotraj.run_folder.lock import locked
from cluster.exit_codes import EXIT_OK
from tasks.load import load_tasks
from trajectory.types import Task


def load_benchmarks(suite: BenchmarkSuite) -> dict[str, list[Task]]:
    """Every benchmark's problems, all read before anything starts. Raises UserError, which names the benchmark."""
    found = {}
    for benchmark in suite.benchmarks:
        try:
            found[benchmark.name] = load_tasks(benchmark.data)
        except ValueError as error:
            raise UserError(f"benchmark {benchmark.name}: {error}") from error
    return found


def evaluate_suite(config_path: str | None, overrides: Sequence[str], suite_path: str, out: str) -> int:
    """Sample `model` on every benchmark of a suite, and write `<out>/<benchmark>.json`."""
    console = Console()
    config = load(config_path, [*overrides, preflight.EVALUATION_ALONE])
    suite = load_suite(suite_path)
    tasks = load_benchmarks(suite)
    preflight.check(config)
    preflight.check_writable("--out", out)
    preflight.check_last(config, {f"benchmark {name}": listed for name, listed in tasks.items()})
    folder = Path(out)

    from autotraj.evaluation.judge import judge
    from autotraj.launch import engines, evaluate_engines, run_session

    results: list[BenchmarkResult] = []
    with (
        locked(folder, called="--out"),
        graceful_interrupt(),
        run_session(config) as gateway,
        engines(config, gateway) as pool,
    ):
        for benchmark in suite.benchmarks:
            changed = with_changes(
                config, {"eval.num_samples": benchmark.num_samples, "eval.temperature": benchmark.temperature}
            )
            sampled = evaluate_engines(benchmark.name, pool, changed, tasks[benchmark.name])
            verdicts = None
            if benchmark.judged:
                assert suite.judge is not None, "the suite was checked"
                verdicts = asyncio.run(judge(sampled.groups, suite.judge))
            result = benchmark_result(folder.name, benchmark.name, sampled.groups, verdicts=verdicts, seed=config.seed)
            (folder / f"{benchmark.name}.json").write_text(result.to_json() + "\n")
            results.append(result)
            console.print(f"{benchmark.name}: done after {sampled.seconds:.0f} s", markup=False)
            for line in explain(sampled.groups):
                console.print(f"{benchmark.name}: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(comparison_table([results]))
    console.print(f"figures: {folder}; beside another run's: python -m autotraj compare OTHER {folder}")
    return EXIT_OK


def compare(folders: Sequence[str]) -> int:
    """`python -m autotraj compare`: the results of `evaluate --benchmarks`, one column for each run."""
    runs = []
    for folder in folders:
        files = sorted(Path(folder).glob("*.json"))
        if not files:
            raise UserError(f"{folder}: no results there; `evaluate --benchmarks FILE --out {folder}` writes them")
        runs.append([_result(file) for file in files])
    try:
        Console().print(comparison_table(runs))
    except ValueError as error:
        raise UserError(str(error)) from error
    return EXIT_OK


def _result(file: Path) -> BenchmarkResult:
    try:
        return BenchmarkResult.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        is_run = (file.parent / "config.toml").exists()
        what = f"{file.parent} is the folder of a run, not of results" if is_run else f"{file} is no result: {error}"
        raise UserError(
            f"{what}; compare reads what `python -m autotraj evaluate --benchmarks FILE --out FOLDER` writes"
        ) from error
