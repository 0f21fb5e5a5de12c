"""Shows runs side by side: each benchmark's figures, and the difference to the first run, paired by problem."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from autotraj.evaluation.benchmarks import BenchmarkResult
from autotraj.evaluation.intervals import Estimate, paired_difference

COUNTS = ("tool_calls", "generated_tokens")
"""Metrics that are counts and not shares."""


def difference(first: BenchmarkResult, second: BenchmarkResult, metric: str, *, seed: int = 0) -> Estimate:
    """`metric` of `second` minus that of `first`, by the paired bootstrap over the problems for which both have a value.

    Raises ValueError if they weren't measured on the same problems, or have no value in common.
    """
    if first.benchmark != second.benchmark or set(first.problem_ids) != set(second.problem_ids):
        raise ValueError(
            f"{first.run} and {second.run} weren't measured on the same problems ({first.benchmark}: "
            f"{first.num_problems}, {second.benchmark}: {second.num_problems}): their difference can't be paired"
        )
    if metric not in first.per_problem or metric not in second.per_problem:
        raise ValueError(f"{metric} wasn't measured in both {first.run} and {second.run}")
    by_id = dict(zip(second.problem_ids, second.per_problem[metric], strict=True))
    pairs = [
        (a, b)
        for problem, a in zip(first.problem_ids, first.per_problem[metric], strict=True)
        if a is not None and (b := by_id[problem]) is not None
    ]
    if not pairs:
        raise ValueError(f"{metric}: no problem has a value in both {first.run} and {second.run}")
    return paired_difference([a for a, _ in pairs], [b for _, b in pairs], seed=seed)


def comparison_table(runs: Sequence[Sequence[BenchmarkResult]]) -> Table:
    """A row for each benchmark and metric, a column for each run. From the second on, with the difference to the first.

    `runs`: each run's results, one for each benchmark; a run may lack some. A difference whose interval doesn't contain 0 is
    bold. Raises ValueError as `difference` does, and for a benchmark that one run has twice.
    """
    table = Table(title="Benchmarks, with 95 % confidence intervals", title_justify="left")
    table.add_column("benchmark")
    table.add_column("metric")
    columns = [{result.benchmark: result for result in results} for results in runs]
    for results, column in zip(runs, columns, strict=True):
        if len(column) != len(results):
            raise ValueError(f"{results[0].run}: a benchmark occurs twice among its results")
        table.add_column(results[0].run if results else "", justify="right")
    for benchmark in dict.fromkeys(result.benchmark for results in runs for result in results):
        cells = [column.get(benchmark) for column in columns]
        metrics = dict.fromkeys(metric for result in cells if result is not None for metric in result.metrics)
        for i, metric in enumerate(metrics):
            row = [_cell(cells[0], result, metric) for result in cells]
            table.add_row(_heading(benchmark, cells) if i == 0 else "", metric, *row, end_section=i == len(metrics) - 1)
    return table


def _heading(benchmark: str, cells: Sequence[BenchmarkResult | None]) -> str:
    result = next(cell for cell in cells if cell is not None)
    failed = [str(cell.num_failed) if cell is not None else "-" for cell in cells]
    lines = [benchmark, f"{result.num_problems} problems × {result.num_samples}"]
    if set(failed) - {"0", "-"}:
        lines.append(f"failed: {' / '.join(failed)}")
    if any(cell is not None and cell.judge_failures for cell in cells):
        counts = [str(sum(cell.judge_failures.values())) if cell is not None else "-" for cell in cells]
        lines.append(f"no verdict: {' / '.join(counts)}")
    return "\n".join(lines)


def _cell(first: BenchmarkResult | None, result: BenchmarkResult | None, metric: str) -> str:
    if result is None or metric not in result.metrics:
        return "-"
    text = _format(result.metrics[metric], metric)
    if first is None or first is result or metric not in first.metrics:
        return text
    change = difference(first, result, metric)
    certain = change.low > 0 or change.high < 0
    changed = f"Δ {_format(change, metric, sign='+')}"
    return f"{text}\n[bold]{changed}[/bold]" if certain else f"{text}\n{changed}"


def _format(estimate: Estimate, metric: str, sign: str = "") -> str:
    """`62.5 % (58.1 to 66.7)`; for counts without the percent sign."""
    scale, unit = (1.0, "") if metric in COUNTS else (100.0, " %")
    value, low, high = (scale * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:{sign}.1f}{unit} ({low:{sign}.1f} to {high:{sign}.1f})"
