"""Counts groups that fail one after another, and ends a stage when there are too many. Pure.

A group that fails is handed back, or dropped, with its reason, and the stage goes on. That is right for a temporary cause: a
busy engine, a reward model that restarts. If every group fails, the stage would go on forever without a message.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from autotraj.errors import GroupsFail, ScoringReason
from trajectory.types import Group

logger = logging.getLogger(__name__)

ROUNDS = 3
"""As many groups may fail in a row as are in flight at once, times this. One outage fails all groups in flight, and perhaps
those sampled again after it; a prompt is tried `grpo.max_attempts` = 3 times, too."""
LEAST = 16
"""The least number of failures in a row that can end a stage, however few groups are in flight."""
TEXT_CHARS = 400

FailureReason = Literal["episode_error", "episode_deadline", "nonfinite_logprobs", ScoringReason]

_REWARD_MODEL = "Mend the reward model's actor (scorer), or set reward_model.when_unavailable = 'score-without'"
REMEDIES: dict[FailureReason, str] = {
    "episode_error": "Mend what it says; a prompt that is too long needs a larger episode.max_prompt_tokens",
    "episode_deadline": "Raise episode.deadline_s, or have less at work at once (rollout.max_concurrent_episodes)",
    "nonfinite_logprobs": "The engine's weights or its dtype are broken: check the model and engine.dtype; if training has "
    "broken it, lower learner.lr and go on from a checkpoint of before",
    "nonfinite_reward": "Mend the part of the reward that it names",
    "reward_term_failed": "Mend the function that it names, take it out of reward.terms, or raise reward.terms_timeout_s",
    "reward_model_timeout": _REWARD_MODEL,
    "reward_model_refused": _REWARD_MODEL,
    "reward_model_down": _REWARD_MODEL,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a group can't be used. `reason` is for counting, with `term`, the reward term that failed; `text` for people."""

    reason: FailureReason
    text: str
    term: str = ""

    @property
    def counted_as(self) -> str:
        return f"{self.reason}:{self.term}" if self.term else self.reason


def episode_failure(group: Group) -> Failure | None:
    """The first failure of an episode that the policy didn't cause, or None."""
    for t in group.trajectories:
        if t.failed:
            reason: FailureReason = "episode_error" if t.finish_reason == "error" else "episode_deadline"
            return Failure(reason, f"task {t.task_id}: {t.error}")
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
        self._first: dict[str, Failure] = {}  # what it is counted as → the first of this row
        self._told: set[str] = set()

    def succeeded(self) -> None:
        """To be called for a group that came back whole: it ends the row of failures."""
        self._reasons.clear()
        self._first.clear()

    def failed(self, failure: Failure) -> None:
        """Counts a failure, and logs the first of each reason."""
        name = failure.counted_as
        if name not in self._told:
            self._told.add(name)
            logger.warning("%s: a group failed (%s): %s", self._what, name, _in_one_line(failure.text))
        self._reasons[name] += 1
        self._first.setdefault(name, failure)

    @property
    def too_many(self) -> bool:
        """Whether to start no group until all in flight have come back. Prompts that fail at once come back before a good
        group that takes longer; that group would end the row."""
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
        """The error. It names the most frequent reason in the row, its count, its first failure and the remedy."""
        (reason, count), *others = self._reasons.most_common()
        first = self._first[reason]
        among = "".join(f", {number} by {other}" for other, number in others)
        return GroupsFail(
            f"{self._what}: the last {self._reasons.total()} groups have all failed, {count} by {reason}{among}. The first "
            f"by {reason}: {_in_one_line(first.text)}. {REMEDIES[first.reason]}"
        )


def _in_one_line(text: str) -> str:
    return " ".join(text.split())[:TEXT_CHARS]
