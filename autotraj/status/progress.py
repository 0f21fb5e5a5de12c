"""What the terminal shows during a run: a progress bar and the last steps of GRPO, or plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_EVERY_S = 15.0
GRPO_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward_mean", "{:.2f}"),
    ("accuracy", "accuracy", "{:.0%}"),
    ("tools", "tool_call_rate", "{:.0%}"),
    ("stale", "staleness_mean", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:.0f}"),
    ("sampling", "queue/leased", "{:.0f}"),
    ("scored", "queue/scored", "{:.0f}"),
    ("gate", "sync/logprob_diff_mean", "{:.0e}"),
    ("s/step", "step_seconds", "{:.1f}"),
)
"""Heading, metric, format."""
GRPO_HEADING = "step  " + " ".join(f"{heading:>8}" for heading, _, _ in GRPO_COLUMNS)
GRPO_ROWS = 12
"""How many steps a terminal shows at a time."""
GRPO_PLAIN_EVERY = 10
"""Without a terminal, every step that is a multiple of this gets a line."""


class StageProgress(Progress):
    """The bar of one stage. Call `show(done, total, "kept 12, repaired 30")`."""

    def __init__(self, name: str, unit: str, console: Console) -> None:
        super().__init__(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,
        )
        self._name, self._unit = name, unit
        self._last_line = time.monotonic()
        self._bar = self.add_task(name, total=None, note="")

    def show(self, done: int, total: int, note: str) -> None:
        self.update(self._bar, completed=done, total=total, note=note)
        now = time.monotonic()
        if self.disable and now - self._last_line > PLAIN_EVERY_S:
            self._last_line = now
            self.console.print(f"{self._name}: {done}/{total} {self._unit}; {note}", soft_wrap=True)

    def step(self, number: int, total: int, metrics: Mapping[str, float]) -> None:
        """Shows an optimizer step of a supervised stage."""
        shown = [("loss", "loss"), ("accuracy", "accuracy"), ("held_out/accuracy", "held out")]
        self.show(number, total, ", ".join(f"{label} {metrics[key]:.3f}" for key, label in shown if key in metrics))


class GrpoProgress(StageProgress):
    """The last steps above the bar."""

    def __init__(self, num_steps: int, console: Console) -> None:
        self._rows = [GRPO_HEADING]
        super().__init__("GRPO", "steps", console)
        self.update(self._bar, total=num_steps)
        self._num_steps = num_steps
        if self.disable:
            console.print(GRPO_HEADING, soft_wrap=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What `Progress` draws: the last steps, and below them the bar."""
        yield Text("\n".join(self._rows))
        yield from super().get_renderables()

    def grpo_step(self, step: int, metrics: Mapping[str, float]) -> None:
        cells = [layout.format(metrics.get(name, 0.0)) for _, name, layout in GRPO_COLUMNS]
        row = f"{step:>4}  " + " ".join(f"{cell:>8}" for cell in cells)
        self._rows = [GRPO_HEADING, *[*self._rows[1:], row][-GRPO_ROWS:]]
        self.update(self._bar, completed=step)
        if self.disable and (step % GRPO_PLAIN_EVERY == 0 or step in (1, self._num_steps)):
            self.console.print(row, soft_wrap=True)
