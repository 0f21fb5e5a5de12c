"""The state and the metrics of a loop, for people and for Prometheus."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from autotraj.config.run import RunConfig
from autotraj.runners.pool import RunnerPool
from autotraj.sampling.metrics import describe_ledger
from autotraj.status.board import StatusBoard
from autotraj.status.prometheus import MetricsExport
from autotraj.status.rows import LoopState, StatusRow, loop_rows, runner_rows
from learners.group import StepResult
from trajectory.ledger import Ledger
from trajectory.types import Group

EXPORT_EVERY_S = 1.0


def announce(config: RunConfig) -> None:
    """Write a run's first status. Until its parts report by themselves, it may wait for machines."""
    StatusBoard(config.folder, rows=list, title=lambda: f"a run of {config.model}").now_does(
        "waits for Ray to place its sandbox and actors"
    )


def watch_pool(runners: RunnerPool, folder: Path, title: str) -> StatusBoard:
    """The status of a stage that only has engines."""
    board = StatusBoard(folder, rows=lambda: runner_rows(runners.views()), title=lambda: title)
    runners.on_poll = board.look
    runners.board = board
    return board


class LoopView(Protocol):
    """The properties of a loop that its inspection reads."""

    runners: RunnerPool
    ledger: Ledger

    def title(self) -> str: ...
    def loop_state(self) -> LoopState: ...
    def scoring_metrics(self) -> dict[str, float]: ...


class Inspection:
    """Collects the state and the metrics of one loop."""

    def __init__(self, loop: LoopView, folder: Path) -> None:
        self._loop = loop
        self._export = MetricsExport()
        self._exported = float("-inf")
        self._lost_before: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self.board = StatusBoard(folder, rows=self._rows, title=loop.title)
        loop.runners.on_poll = self.look
        loop.runners.board = self.board

    def look(self) -> None:
        """Update the status and the gauges. Called at every poll."""
        self.board.look()
        if time.monotonic() - self._exported >= EXPORT_EVERY_S:
            self._exported = time.monotonic()
            ledger, runners = self._loop.ledger, self._loop.runners
            totals = {"runner_restarts": float(runners.num_restarts), **describe_ledger(ledger)}
            self._export.now(ledger.counts(), runners.views(), totals)

    def stepped(self, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        self._export.step(groups, metrics)
        self.counts_from_here()

    def counts_from_here(self) -> None:
        """Start counting losses for the next step: a step is done, or the loop begins or was set back."""
        ledger = self._loop.ledger
        self._lost_before = (Counter(ledger.drop_reasons), Counter(ledger.hand_back_reasons))

    def measured(self, result: StepResult) -> dict[str, float]:
        """The metrics of the step that `result` ended, from its learners, the pool, the ledger and the scorers."""
        runners = self._loop.runners
        return {
            "runners_serving": float(runners.num_serving),
            "runner_restarts": float(runners.num_restarts),
            **(runners.gate.metrics if runners.gate else {}),
            "sync_seconds": runners.sync_seconds,
            **describe_ledger(self._loop.ledger),
            **{
                f"learner/{name}": float(value)
                for name, value in result.metrics.items()
                if not name.startswith("on_policy_")  # sums, whose means are among the gate's metrics
            },
            **{f"learner/seconds/{phase}": seconds for phase, seconds in result.seconds.items()},
            **self._loop.scoring_metrics(),
        }

    def waiting(self) -> str:
        """Which part waits for what, in one line."""
        return "; ".join(
            f"{row.who}: {row.does}"
            + (f", on {row.waits_on}" if row.waits_on else "")
            + (f" ({row.detail})" if row.detail else "")
            for row in self._rows()
        )

    def _rows(self) -> list[StatusRow]:
        ledger, (dropped, handed_back) = self._loop.ledger, self._lost_before
        state = replace(
            self._loop.loop_state(),
            dropped=ledger.drop_reasons - dropped,
            handed_back=ledger.hand_back_reasons - handed_back,
        )
        return loop_rows(state)
