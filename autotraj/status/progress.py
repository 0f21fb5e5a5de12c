"""What a person sees while a run goes on: one line a step, and a live bar where there is a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward_mean", "{:.2f}"),
    ("accuracy", "accuracy", "{:.0%}"),
    ("tools", "tool_call_rate", "{:.0%}"),
    ("stale", "staleness_mean", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:.0f}"),
    ("sampling", "queue/leased", "{:.0f}"),
    ("scored", "queue/scored", "{:.0f}"),
    ("gate", "gate_max_delta", "{:.0e}"),
    ("s/step", "step_seconds", "{:.1f}"),
)
"""Heading, metric, format."""


class ProgressView:
    """Shows the last steps; off a terminal it prints every `every`-th step as a plain line instead."""

    def __init__(self, num_steps: int, *, console: Console | None = None, rows: int = 12, every: int = 10) -> None:
        self.console = console or Console()
        self._num_steps, self._max_rows, self._every = num_steps, rows, every
        self._rows: list[list[str]] = []
        self._bar = Progress(
            TextColumn("GRPO"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("grpo", total=num_steps)
        self._live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None

    def __enter__(self) -> ProgressView:
        if self._live:
            self._live.start()
        else:
            self._line("step", [heading for heading, _, _ in COLUMNS])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def _line(self, step: str, cells: Sequence[str]) -> None:
        self.console.print(f"{step:>4}  " + " ".join(f"{cell:>8}" for cell in cells), soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        cells = [layout.format(metrics.get(name, 0.0)) for _, name, layout in COLUMNS]
        if not self._live:
            if step % self._every == 0 or step in (1, self._num_steps):
                self._line(str(step), cells)
            return
        self._rows = [*self._rows, [str(step), *cells]][-self._max_rows :]
        self._bar.update(self._task, completed=step)
        table = Table(box=None, pad_edge=False)
        for heading in ("step", *(heading for heading, _, _ in COLUMNS)):
            table.add_column(heading, justify="right")
        for row in self._rows:
            table.add_row(*row)
        grid = Table.grid()
        grid.add_row(table)
        grid.add_row(self._bar)
        self._live.update(grid)
