"""Keeps the state of every task in an epoch, so that no prompt is lost and none is trained on twice.

    pending ──lease──▶ leased ──finish──▶ finished ──score──▶ scored ──train──▶ trained
       ▲                 │                   │                   │
       └───hand_back─────┴───────────────────┴───────────────────┘      (after `max_attempts` leases: dropped)
                         └──────────drop─────┴───────────────────┴──────▶ dropped, with a reason

The unit of work is a (task, epoch): every epoch goes through all tasks once, in its own order. A task that is handed back
goes to the front of the queue: tasks that take longest fail most often, and losing them would bias lengths. The ledger is a
plain state machine for one thread. It never waits and has no clock.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trajectory.types import Task

State = Literal["leased", "finished", "scored"]


class LedgerError(RuntimeError):
    """A transition that the ledger doesn't allow, such as a result for a lease that expired before the result came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Permission to make one group of trajectories for one task, and the duty to do so."""

    lease_id: str  # "epoch-index-attempt": unique within a run
    task: Task
    epoch: int
    attempt: int  # 1 for the first lease of this task in this epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerCounts:
    """How many (task, epoch) are in each state. `pending` counts the rest of this epoch and what was handed back."""

    pending: int
    leased: int
    finished: int
    scored: int
    trained: int
    dropped: int


@dataclass(slots=True)
class _Entry:
    lease: Lease
    index: int  # of the task
    state: State


class Ledger:
    """See the module's docstring. Each operation takes at most O(log n), except `state`, `restore` and a new epoch."""

    def __init__(self, tasks: Sequence[Task], *, seed: int, max_attempts: int = 3) -> None:
        if not tasks:
            raise ValueError("the ledger needs at least one task")
        if max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {max_attempts}")
        self._tasks = tuple(tasks)
        self._seed = seed
        self._max_attempts = max_attempts
        self._fingerprint = hashlib.sha256("\0".join(task.id for task in tasks).encode()).hexdigest()
        self._epoch = 0
        self._order = self._shuffle(epoch=0)
        self._cursor = 0
        self._returned: deque[tuple[int, int, int]] = deque()  # (epoch, index, attempts so far)
        self._entries: dict[str, _Entry] = {}
        self._num_in: Counter[State] = Counter()
        self._num_trained = 0
        self._last_step = -1
        self.drop_reasons: Counter[str] = Counter()
        self.hand_back_reasons: Counter[str] = Counter()

    # Steps of an actor's work

    def lease(self) -> Lease:
        """Hand out the next task: first what was handed back, then the rest of this epoch, then the next epoch."""
        if self._returned:
            epoch, index, attempts = self._returned.popleft()
        else:
            if self._cursor == len(self._order):
                self._epoch += 1
                self._order = self._shuffle(self._epoch)
                self._cursor = 0
            epoch, index, attempts = self._epoch, int(self._order[self._cursor]), 0
            self._cursor += 1
        lease = Lease(
            lease_id=f"{epoch}-{index}-{attempts + 1}",
            task=self._tasks[index],
            epoch=epoch,
            attempt=attempts + 1,
        )
        self._entries[lease.lease_id] = _Entry(lease, index, "leased")
        self._num_in["leased"] += 1
        return lease

    def finish(self, lease_id: str) -> None:
        """Note that the group came back. From now on it doesn't depend on its owner or its deadline."""
        self._move(lease_id, "leased", "finished")

    def score(self, lease_id: str) -> None:
        """Note that every trajectory of the group has its reward."""
        self._move(lease_id, "finished", "scored")

    def train(self, lease_ids: Collection[str], step: int) -> None:
        """Note that step `step` trained on these groups: on all of them, or on none if one of them wasn't scored.

        Steps must increase: if a step were recorded twice, something would have been trained on twice.
        """
        if step <= self._last_step:
            raise LedgerError(f"step {step} can't be recorded after step {self._last_step}")
        if len(set(lease_ids)) != len(lease_ids):
            raise LedgerError(f"step {step} names a lease twice")
        for lease_id in lease_ids:
            self._expect(lease_id, "scored")
        for lease_id in lease_ids:
            self._remove(lease_id)
        self._num_trained += len(lease_ids)
        self._last_step = step

    def drop(self, lease_id: str, reason: str) -> None:
        """Give up this task for this epoch."""
        self._remove(lease_id)
        self.drop_reasons[reason] += 1

    def hand_back(self, lease_id: str, reason: str) -> bool:
        """Put the task at the front of the queue, or drop it if it was leased `max_attempts` times.

        Returns whether it is in the queue again.
        """
        entry = self._remove(lease_id)
        if entry.lease.attempt >= self._max_attempts:
            self.drop_reasons[reason] += 1
            return False
        self.hand_back_reasons[reason] += 1
        self._returned.appendleft((entry.lease.epoch, entry.index, entry.lease.attempt))
        return True

    # What can be asked

    def counts(self) -> LedgerCounts:
        return LedgerCounts(
            pending=len(self._returned) + len(self._order) - self._cursor,
            leased=self._num_in["leased"],
            finished=self._num_in["finished"],
            scored=self._num_in["scored"],
            trained=self._num_trained,
            dropped=self.drop_reasons.total(),
        )

    @property
    def epoch(self) -> int:
        """The epoch from which new tasks are taken, from 0."""
        return self._epoch

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """The whole state, as data that msgpack can encode."""
        return {
            "tasks": self._fingerprint,
            "epoch": self._epoch,
            # The order itself and not its seed, as a shuffle may differ between versions of numpy.
            "order": self._order[self._cursor :].astype("<i4").tobytes(),
            "returned": [list(item) for item in self._returned],
            "in_flight": [
                [entry.lease.epoch, entry.index, entry.lease.attempt, entry.state] for entry in self._entries.values()
            ],
            "trained": self._num_trained,
            "last_step": self._last_step,
            "drop_reasons": dict(self.drop_reasons),
            "hand_back_reasons": dict(self.hand_back_reasons),
        }

    def restore(self, state: dict[str, Any], held: Collection[str] = ()) -> None:
        """Take over the state of the ledger that returned `state`, in a new process in which nothing is being worked on.

        `held` are the lease ids of the scored groups that the caller restored too: they stay scored. All other leases
        that were not done are pending again, at the front and in the order in which they were leased. That attempt
        doesn't count, as the task did not cause its end. Raises ValueError if the tasks are not the same as then, or if
        `held` names a group that wasn't scored.
        """
        if state["tasks"] != self._fingerprint:
            raise ValueError(
                "the checkpoint was made with other tasks: "
                "resume with the same data, or start a new run without the checkpoint"
            )
        entries: dict[str, _Entry] = {}
        returned: deque[tuple[int, int, int]] = deque()
        for epoch, index, attempt, *_, entry_state in state["in_flight"]:  # earlier versions kept a policy version, too
            lease_id = f"{epoch}-{index}-{attempt}"
            if entry_state == "scored" and lease_id in held:
                lease = Lease(lease_id=lease_id, task=self._tasks[index], epoch=epoch, attempt=attempt)
                entries[lease_id] = _Entry(lease, index, "scored")
            else:
                returned.append((epoch, index, attempt - 1))
        if unknown := set(held) - entries.keys():
            raise ValueError(f"held groups that the checkpoint's ledger doesn't know as scored: {sorted(unknown)[:5]}")
        returned.extend((epoch, index, attempts) for epoch, index, attempts in state["returned"])
        self._epoch, self._cursor = state["epoch"], 0
        self._order = np.frombuffer(state["order"], dtype="<i4").astype(np.int32)
        self._returned, self._entries, self._num_in = returned, entries, Counter()
        self._num_in["scored"] = len(entries)
        self._num_trained, self._last_step = state["trained"], state["last_step"]
        self.drop_reasons = Counter(state["drop_reasons"])
        self.hand_back_reasons = Counter(state["hand_back_reasons"])

    # Inside

    def _shuffle(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._tasks)).astype(np.int32)

    def _expect(self, lease_id: str, state: State) -> _Entry:
        entry = self._entries.get(lease_id)
        if entry is None or entry.state != state:
            found = entry.state if entry else "not held: it was trained, dropped or handed back, or never leased"
            raise LedgerError(f"lease {lease_id} should be {state}, but is {found}")
        return entry

    def _move(self, lease_id: str, source: State, target: State) -> None:
        entry = self._expect(lease_id, source)
        entry.state = target
        self._num_in[source] -= 1
        self._num_in[target] += 1

    def _remove(self, lease_id: str) -> _Entry:
        entry = self._entries.get(lease_id)
        if entry is None:
            raise LedgerError(f"lease {lease_id} is not held: it was trained, dropped or handed back, or never leased")
        self._num_in[entry.state] -= 1
        del self._entries[lease_id]
        return entry


def admissible(
    *, leased: int, finished: int, trained: int, version: int, groups_per_step: int, max_staleness: int
) -> int:
    """How many more groups may start now, so that each is probably trained on in time (AReaL, arXiv 2505.24298).

    A group may start only if  leased + finished < (max_staleness + 1 + version) · groups_per_step − trained.

    `finished` counts the groups that came back and aren't trained on yet, including scored ones. `trained` counts the groups
    that steps used. `version` is the policy's, which rises by one with each step. The right side is the number of groups
    that the steps up to `max_staleness` from now will use, so a group that starts now is trained on by then.

    Worked example, groups_per_step = 4:
      max_staleness = 0, version 0: 4 may start, and no more until the step: synchronous training. After the step
      (trained = 4, version = 1): (0 + 1 + 1) · 4 − 4 = 4 again.
      max_staleness = 1, version 0: 8 may start. After one step with the other 4 still in flight:
      (1 + 1 + 1) · 4 − 4 − 4 = 4 may start.

    A group whose rewards don't vary has no gradient. With dynamic sampling it is dropped after scoring: it leaves
    `finished` and doesn't enter `trained`, so the formula admits a replacement by itself. Without dynamic sampling it is
    part of the step and is given to `Ledger.train` with the others; if it were dropped, the step would wait for a group.
    """
    capacity = (max_staleness + 1 + version) * groups_per_step - trained
    return max(0, capacity - leased - finished)


def is_stale(min_policy_version: int, current_version: int, max_staleness: int) -> bool:
    """Whether a sample of `min_policy_version` is too old for the next step, which `current_version` takes."""
    return current_version - min_policy_version > max_staleness
