"""Groups that failed one after another, why, and when that ends a stage. Pure.

A group that fails is handed back, or dropped, with its reason, and the stage goes on. That is right for what passes: an
engine that was busy, a reward model that starts again. Where every group fails it would go on for ever without a word.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np

from autotraj.errors import GroupsFail
from trajectory.types import Group

logger = logging.getLogger(__name__)

ROUNDS = 3
"""So many times what is in flight at once may fail in a row: one outage fails all that is in flight then, and may fail what
is sampled again after it; a prompt is tried `grpo.max_attempts` = 3 times, too."""
LEAST = 16
"""Failures in a row that end nothing, however little is in flight."""
TEXT_CHARS = 400

REMEDIES = {
    "episode_error": "Mend what it says; a prompt that is too long needs a larger episode.max_prompt_tokens",
    "episode_deadline": "Raise episode.deadline_s, or have less at work at once (rollout.max_concurrent_episodes)",
    "nonfinite_logprobs": "The engine's weights or its dtype are broken: check the model and engine.dtype; if training has "
    "broken it, lower learner.lr and go on from a checkpoint of before",
    "nonfinite_reward": "Mend the part of the reward that it names",
    "reward_model": "Mend the reward model's actor (scorer), or set reward_model.when_unavailable = 'score-without'",
}
"""The beginning of a reason → what to change."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a group can't be used. `reason` is a short name for counting, `text` what a person reads."""

    reason: str
    text: str


def episode_failure(group: Group) -> Failure | None:
    """The first failure of an episode that wasn't the policy's doing, or None."""
    for t in group.trajectories:
        if t.failed:
            return Failure(f"episode_{t.finish_reason}", f"task {t.task_id}: {t.error}")
    return None


def failure_of(group: Group) -> Failure | None:
    """Why a group can't be trained on: a failed episode, or logprobs that are no numbers; None if it can."""
    if failure := episode_failure(group):
        return failure
    for t in group.trajectories:
        sampled = t.logprobs[t.loss_mask]
        if num_bad := int(np.count_nonzero(~np.isfinite(sampled))):
            text = (
                f"task {t.task_id}: {num_bad} of {len(sampled)} sampled tokens have a logprob that is no finite number"
            )
            return Failure("nonfinite_logprobs", text)
    return None


class FailuresInARow:
    """Call `failed` or `succeeded` for each group that comes back. `what` is the stage, for messages; at most
    `num_in_flight` groups are at work at once."""

    def __init__(self, what: str, num_in_flight: int) -> None:
        self._what = what
        self._limit = max(ROUNDS * num_in_flight, LEAST)
        self._reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # reason → the first text of this row
        self._told: set[str] = set()

    def succeeded(self) -> None:
        """A group came back whole: whatever failed before, it was not everything."""
        self._reasons.clear()
        self._first.clear()

    def failed(self, failure: Failure) -> None:
        """Says the first of every reason."""
        text = " ".join(failure.text.split())[:TEXT_CHARS]
        if failure.reason not in self._told:
            self._told.add(failure.reason)
            logger.warning("%s: a group failed (%s): %s", self._what, failure.reason, text)
        self._reasons[failure.reason] += 1
        self._first.setdefault(failure.reason, text)

    @property
    def too_many(self) -> bool:
        """Nothing more is handed out then, until all that is in flight has come back: a prompt that fails at once is
        overtaken by many of its kind before one that does not is sampled."""
        return self._reasons.total() >= self._limit

    def check(self, *, idle: bool) -> None:
        """Raises GroupsFail if too many failed in a row and nothing is in flight that could end the row."""
        if self.too_many and idle:
            raise self.error()

    def check_all(self) -> None:
        """Raises GroupsFail if the last group failed; for a stage that ends without a single group that can be used."""
        if self._reasons:
            raise self.error()

    def error(self) -> GroupsFail:
        """Names the reason of most failures in the row, how many there were, the first of them and the remedy."""
        (reason, count), *others = self._reasons.most_common()
        remedy = next((text for start, text in REMEDIES.items() if reason.startswith(start)), "Mend what it says")
        among = "".join(f", {number} by {other}" for other, number in others)
        return GroupsFail(
            f"{self._what}: the last {self._reasons.total()} groups have all failed, {count} by {reason}{among}. The first "
            f"by {reason}: {self._first[reason]}. {remedy}"
        )
