"""What the GRPO loop shows of itself, to people and to Prometheus. Reads the algorithm, and changes nothing in it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autotraj.loop.step_metrics import describe_ledger
from autotraj.runners.pool import RunnerPool
from autotraj.status.board import StatusBoard
from autotraj.status.prometheus import MetricsExport
from autotraj.status.rows import LoopState, Row, loop_rows, runner_rows
from learners.group import StepResult
from trajectory.types import Group

if TYPE_CHECKING:
    from autotraj.config.run import RunConfig
    from autotraj.loop.grpo import GRPO

EXPORT_EVERY_S = 1.0


def announce(config: RunConfig) -> None:
    """A run's first word: until its parts have boards of their own it may wait for machines, and be asked why."""
    StatusBoard(config.folder, rows=list, title=lambda: f"a run of {config.model}").now_does(
        "waits for Ray to place its sandbox and actors"
    )


def watch_pool(runners: RunnerPool, folder: Path, title: str) -> StatusBoard:
    """The status of a stage that only has engines."""
    board = StatusBoard(folder, rows=lambda: runner_rows(runners.views()), title=lambda: title)
    runners.on_poll = board.look
    runners.board = board
    return board


class Inspection:
    """Belongs to one `GRPO`, whose state it reads."""

    def __init__(self, algo: GRPO) -> None:
        self._algo = algo
        self._export = MetricsExport()
        self._exported = float("-inf")
        self._lost_before: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self.board = StatusBoard(algo.config.run_config.folder, rows=self._rows, title=self._title)
        algo.runners.on_poll = self.look
        algo.runners.board = self.board

    def look(self) -> None:
        """At every poll."""
        self.board.look()
        if time.monotonic() - self._exported >= EXPORT_EVERY_S:
            self._exported = time.monotonic()
            ledger, runners = self._algo._ledger, self._algo.runners
            totals = {"runner_restarts": float(runners.num_restarts), **describe_ledger(ledger)}
            self._export.now(ledger.counts(), runners.views(), totals)

    def stepped(self, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        self._export.step(groups, metrics)
        self.counts_from_here()

    def counts_from_here(self) -> None:
        """A step is done, or the loop begins or was set back: what is lost from now on is the next step's."""
        ledger = self._algo._ledger
        self._lost_before = (Counter(ledger.drop_reasons), Counter(ledger.hand_back_reasons))

    def measured(self, result: StepResult) -> dict[str, float]:
        """Of the step that `result` ended: what its learners, the pool, the ledger and the scorers say."""
        algo, runners = self._algo, self._algo.runners
        return {
            "runners_serving": float(runners.num_serving),
            "runner_restarts": float(runners.num_restarts),
            "gate_max_delta": runners.gate_max_delta,
            "sync_seconds": runners.sync_seconds,
            **describe_ledger(algo._ledger),
            **{f"learner/{name}": float(value) for name, value in result.metrics.items()},
            **{f"learner/seconds/{phase}": seconds for phase, seconds in result.seconds.items()},
            **(algo._scorer.metrics() if algo._scorer else {}),
            **(algo._repair.metrics() if algo._repair else {}),
        }

    def waiting(self) -> str:
        """Who waits on whom, in one line."""
        return "; ".join(
            f"{row.who}: {row.does}"
            + (f", on {row.waits_on}" if row.waits_on else "")
            + (f" ({row.detail})" if row.detail else "")
            for row in self._rows()
        )

    def _title(self) -> str:
        run = self._algo.config.run_config
        return f"GRPO of {run.model}, step {self._algo.policy_version} of {run.grpo.num_steps}"

    def _rows(self) -> list[Row]:
        algo, settings = self._algo, self._algo.config.run_config.grpo
        dropped, handed_back = self._lost_before
        return loop_rows(
            LoopState(
                step=algo.policy_version,
                groups_per_step=settings.groups_per_step,
                max_staleness=settings.max_staleness,
                num_buffered=len(algo._buffer),
                num_scoring=len(algo._scoring),
                num_admissible=algo.num_admissible(),
                learners_up=algo.runners._update is not None,  # they have published weights
                trains=algo._pending is not None,
                broadcasts=algo.runners.broadcasting,
                uses_reward_model=algo._service is not None,
                num_repairs=algo.repairers.num_in_flight("repair") if algo._repair else None,
                runners=algo.runners.views(),
                dropped=algo._ledger.drop_reasons - dropped,
                handed_back=algo._ledger.hand_back_reasons - handed_back,
            )
        )
