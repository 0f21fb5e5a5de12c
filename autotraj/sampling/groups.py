"""Gives tasks to the rollout actors and returns scored groups.

    ledger ──lease──▶ rollout actor ──group──▶ scoring threads ──▶ `collect`
       ▲                   │                         │
       └── handed back ◀───┴── failed                └── dropped: it can't be scored

Stage 1 and the GRPO loop both sample in this way. They decide how many groups may be out and what a scored group is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Generic, TypeVar

from actors.work import Work
from autotraj.errors import ScoringFailed
from autotraj.runners.calls import CallResult, Failed
from autotraj.runners.pool import RunnerPool
from autotraj.sampling.failures import Failure, FailuresInARow, failure_of
from trajectory.ledger import Lease, Ledger
from trajectory.types import Group

NUM_THREADS = 4
COLLECT_WAIT_S = 0.01

T = TypeVar("T")


class GroupSource(Generic[T]):
    """One thread calls all methods. `score` runs in other threads, as it may block: to compare two hostile LaTeX answers may
    take `reward.math_timeout_s`, and the reward model may take its deadline."""

    def __init__(
        self,
        ledger: Ledger,
        runners: RunnerPool,
        score: Callable[[Group], T],
        *,
        failures: FailuresInARow,
        seed_of: Callable[[Lease], int],
        timeout_s: float,
    ) -> None:
        """`score` may raise `ScoringFailed`. `seed_of` gives the seed of a lease's group. A group may take `timeout_s`."""
        self.ledger = ledger
        self.num_tokens = 0  # that the policy generated, of all groups that came back whole
        self._runners = runners
        self._score = score
        self._failures = failures
        self._seed_of = seed_of
        self._timeout_s = timeout_s
        self._threads = futures.ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="score")
        self._scoring: dict[futures.Future[T], str] = {}  # → lease id

    @property
    def num_scoring(self) -> int:
        """The number of groups that wait for their rewards."""
        return len(self._scoring)

    def admit(self, at_most: int) -> None:
        """Starts up to `at_most` further groups, each on the ready runner with the least work."""
        if self._failures.too_many:
            return
        for _ in range(at_most):
            runner_id = self._runners.idle_slot()
            if runner_id is None:
                return
            lease = self.ledger.lease()
            self._runners.submit(
                runner_id,
                lease.lease_id,
                Work.ROLLOUT,
                timeout_s=self._timeout_s,
                lease_id=lease.lease_id,
                task=lease.task,
                seed=self._seed_of(lease),
            )

    def take(self, outcome: CallResult) -> None:
        """Scores a group that came back, or hands a failed one back to the ledger with its reason."""
        if isinstance(outcome, Failed):
            self.ledger.hand_back(outcome.key, outcome.reason)
            return
        group: Group = outcome.value
        if failure := failure_of(group):
            self._failures.failed(failure)
            self.ledger.hand_back(outcome.key, failure.reason)
            return
        self.ledger.finish(outcome.key)
        self.num_tokens += sum(t.num_generated_tokens for t in group.trajectories)
        self._scoring[self._threads.submit(self._score, group)] = outcome.key

    def collect(self) -> Iterator[T]:
        """The groups that have been scored. Waits for up to 10 ms, as most groups are scored in microseconds."""
        done, _ = futures.wait(self._scoring, timeout=COLLECT_WAIT_S if self._scoring else 0)
        for future in done:
            lease_id = self._scoring.pop(future)
            try:
                scored = future.result()
            except ScoringFailed as error:
                failure = Failure(error.reason, str(error), error.term)
                self._failures.failed(failure)
                self.ledger.drop(lease_id, failure.counted_as)
                continue
            self._failures.succeeded()
            self.ledger.score(lease_id)
            yield scored

    def check(self, *, busy: bool = False) -> None:
        """Raises GroupsFail if too many groups failed in a row and nothing under way may end the row. `busy` says whether
        the caller has something under way."""
        counts = self.ledger.counts()
        self._failures.check(idle=not busy and counts.leased + counts.finished == 0)

    def close(self) -> None:
        """Gives up the groups that are being scored."""
        self._threads.shutdown(wait=False, cancel_futures=True)
