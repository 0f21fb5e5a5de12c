"""The part of a reward that comes from the reward model's score of the whole trajectory, and how scores are normalised.

A reward model's score has no scale of its own: Bradley-Terry training fixes only differences. `RunningNorm` gives it one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rewards import outcome
from rewards.config import RewardConfig
from rewards.outcome import AnswerScore
from trajectory.types import TaskKind

PAPER_CLIP = 3.0
"""The released code clips the sum of F1 and weighted score to ± this."""


def trajectory_part(kind: TaskKind, result: AnswerScore, rm: float, config: RewardConfig) -> float:
    """The part that is added to the reward of a well-formed trajectory with the reward-model score `rm`.

    With preset "paper", `rm` is the model's raw score; with "default" it is `RunningNorm.normalise` of it. Raises ValueError
    if it isn't finite.
    """
    if not math.isfinite(rm):
        raise ValueError(f"the reward model's score is {rm}: a broken model or checkpoint, nothing to reward by")
    if config.preset == "paper":
        return paper_qa(result.value, rm, config.trajectory_weight) - result.value if kind == "qa" else 0.0
    return bounded(kind, result, rm, config)


def paper_qa(f1: float, rm: float, weight: float) -> float:
    """The released code's reward of a well-formed QA trajectory: max(F1, clip(F1 + weight·rm, ±3)), and F1 where it is 0.

    A score below 0 has no effect, because of the outer max. Mathematics has no such term.
    """
    return max(f1, min(PAPER_CLIP, max(-PAPER_CLIP, f1 + weight * rm))) if f1 > 0 else f1


def bounded(kind: TaskKind, result: AnswerScore, normalised: float, config: RewardConfig) -> float:
    """weight · normalised score, which raises or lowers the reward, but never across the limit that the answer sets.

    For trajectories of one task, before any overlong punishment, this holds: malformed ≤ well-formed and wrong ≤ boundary ≤
    well-formed and right. The boundary lies between the reward of a wrong answer and that of a right one: half-way for math,
    and for QA at the F1 from which an answer counts as correct. With the default weight and clip, math never reaches it.
    """
    base, floor, boundary = _levels(kind, result, config)
    change = config.trajectory_weight * max(-config.trajectory_clip, min(config.trajectory_clip, normalised))
    if result.correct:
        return max(change, boundary - base)
    return min(max(change, floor - base), boundary - base)


def _levels(kind: TaskKind, result: AnswerScore, config: RewardConfig) -> tuple[float, float, float]:
    """Rewards without the reward model: a well-formed trajectory's, a malformed one's, the boundary of wrong and right."""
    right = config.outcome_weight
    if kind == "qa":
        return right * result.value, config.bad_format_qa, right * outcome.QA_CORRECT_F1
    wrong = config.wrong_but_well_formed
    return right if result.correct else wrong, config.bad_format_math, (wrong + right) / 2


class RunningNorm:
    """Normalises scores by the mean and the deviation of those seen so far.

    Batches are merged by Chan, Golub and LeVeque's update, which never subtracts large squares. Once `memory` values were
    seen, the weight of the oldest falls, so that the norm follows a policy or model that changes. After the reward model is
    replaced, use a new norm; otherwise the first scores are normalised by those of another model.
    """

    def __init__(self, *, clip: float, memory: int = 10_000) -> None:
        """`clip`: largest |normalised score|. `memory`: largest number of values that the past counts as."""
        assert clip > 0
        assert memory > 1
        self._clip = clip
        self._memory = memory
        self._count = 0.0
        self._mean = 0.0
        self._squares = 0.0  # Σ (x − mean)²

    @property
    def mean(self) -> float:
        return self._mean

    @property
    def deviation(self) -> float:
        """Sample deviation (n − 1); 0 until two values were seen."""
        return math.sqrt(self._squares / (self._count - 1)) if self._count > 1 else 0.0

    def update(self, scores: Sequence[float]) -> None:
        """Include a batch of the model's scores. Raises ValueError, and includes none, if one isn't finite."""
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"a reward model's score isn't finite: {[s for s in scores if not math.isfinite(s)][:3]}")
        if not scores:
            return
        n = len(scores)
        mean = math.fsum(scores) / n
        delta = mean - self._mean
        total = self._count + n
        self._squares += math.fsum((s - mean) ** 2 for s in scores) + delta**2 * self._count * n / total
        self._mean += delta * n / total
        self._count = total
        if self._count > self._memory:
            self._squares *= (self._memory - 1) / (self._count - 1)  # the deviation stays the same, its weight falls
            self._count = float(self._memory)

    def normalise(self, score: float) -> float:
        """(score − mean) / deviation, within ± clip; 0 while nothing was seen or all scores seen were the same."""
        deviation = self.deviation
        if deviation <= 1e-9 * max(1.0, abs(self._mean)):  # they are equal except for rounding
            return 0.0
        return max(-self._clip, min(self._clip, (score - self._mean) / deviation))

    def state(self) -> dict[str, float]:
        """The state for a checkpoint."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def restore(self, state: dict[str, float]) -> None:
        """Continue from a value of `state`."""
        self._count, self._mean, self._squares = state["count"], state["mean"], state["squares"]
