"""Scores the quality of a trajectory. Stage 1 keeps, repairs and accepts trajectories by it (arXiv 2601.23032).

candidates ─▶ assess ─▶ split ─▶ kept
                          └────▶ to repair ─▶ a repair is assessed again, with the same ideal length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewards.config import QualityConfig
from rewards.dimensions import DIMENSIONS, QualityInput
from trajectory.types import Task, Trajectory


@dataclass(frozen=True, slots=True)
class Quality:
    """A trajectory's score and its dimensions."""

    score: float  # in [0, 1], rounded to 4 places
    dimensions: dict[str, float]  # unweighted, each in [0, 1]
    num_words: int
    ideal_num_words: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of a question's trajectories, with its quality."""

    index: int
    correct: bool  # a wrong one counts as of low quality, whatever its score
    quality: Quality


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of a question's candidates: those to keep and those to repair."""

    kept: tuple[int, ...]
    to_repair: tuple[int, ...]


def assess(trajectory: Trajectory, task: Task, ideal_num_words: int, config: QualityConfig) -> Quality:
    """All dimensions of `config.weights`, and their weighted sum."""
    words = trajectory.text.split()
    given = QualityInput(words, ideal_num_words, trajectory, task)
    dimensions = {name: DIMENSIONS[name](given) for name in config.weights}
    total = sum(weight * dimensions[name] for name, weight in config.weights.items())
    return Quality(round(total, 4), dimensions, len(words), ideal_num_words)


def split(candidates: Sequence[Candidate], config: QualityConfig) -> Split:
    """Decide which of a question's candidates are kept: all right ones, the best of them (the first of equal ones), or none.

    The paper scores only right answers, so wrong candidates don't count in "every candidate".
    """
    right = [candidate for candidate in candidates if candidate.correct]
    if all(candidate.quality.score >= config.keep_all_from for candidate in right):
        kept = {candidate.index for candidate in right}
    else:
        best = max(right, key=lambda candidate: candidate.quality.score)
        kept = {best.index} if best.quality.score >= config.keep_best_from else set()
    indices = [candidate.index for candidate in candidates]
    return Split(
        kept=tuple(index for index in indices if index in kept),
        to_repair=tuple(index for index in indices if index not in kept),
    )


def ideal_length(texts_of_correct: Sequence[str]) -> int:
    """Number of words of a question's shortest correct trajectory; 0, which means no ideal, if there is none."""
    return min((len(text.split()) for text in texts_of_correct), default=0)
