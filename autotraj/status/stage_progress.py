"""What a person sees of the stages before GRPO: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 15.0


class StageView:
    """One stage's bar. `update(done, total, "kept 12, repaired 30")`."""

    def __init__(self, name: str, unit: str, console: Console) -> None:
        self._name, self._unit, self._console = name, unit, console
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._bar.add_task(name, total=None, note="")

    def __enter__(self) -> StageView:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, note: str) -> None:
        self._bar.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line > PLAIN_EVERY_S):
            self._last_line = now
            self._console.print(f"{self._name}: {done}/{total} {self._unit}; {note}", soft_wrap=True)

    def step(self, number: int, total: int, metrics: Mapping[str, float]) -> None:
        """An optimizer step of a supervised stage."""
        shown = [("loss", "loss"), ("accuracy", "accuracy"), ("held_out/accuracy", "held out")]
        self.update(number, total, ", ".join(f"{label} {metrics[key]:.3f}" for key, label in shown if key in metrics))
