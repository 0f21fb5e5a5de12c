"""The terms of a trajectory's reward, one function each. The reward is their sum.

To add a term here, write a function of `TermInput` and add a line to `REWARD_TERMS`, and its name to `config.BUILT_IN`. Its
name appears in metrics, reports and logs. A term outside of this repository is named by `reward.terms`, see `own_terms`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rewards.config import RewardConfig
from rewards.outcome import AnswerScore
from rewards.trajectory import trajectory_part
from trajectory.types import Task, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class TermInput:
    """The data that a term may use."""

    task: Task
    trajectory: Trajectory
    format_ok: bool
    result: AnswerScore  # of the final answer
    rm: float | None  # the reward model's score; None: there is no reward model
    config: RewardConfig


def outcome_term(given: TermInput) -> float:
    """`outcome_weight` times the outcome; 0 for a malformed trajectory."""
    return given.config.outcome_weight * given.result.value if given.format_ok else 0.0


def format_term(given: TermInput) -> float:
    """Reward for the form alone: a little for mathematics that is well-formed but wrong, a penalty for malformed ones."""
    config, is_math = given.config, given.task.kind == "math"
    if given.format_ok:
        return config.wrong_but_well_formed if is_math and not given.result.correct else 0.0
    return config.bad_format_math if is_math else config.bad_format_qa


def trajectory_term(given: TermInput) -> float | None:
    """The reward model's part; 0 for a malformed trajectory. Raises ValueError for a score that isn't finite."""
    if given.rm is None:
        return None
    return trajectory_part(given.task.kind, given.result, given.rm, given.config) if given.format_ok else 0.0


def overlong_term(given: TermInput) -> float | None:
    """DAPO's soft punishment of long trajectories, if it is enabled."""
    limit, buffer = given.config.overlong_limit_tokens, given.config.overlong_buffer_tokens
    return overlong_penalty(given.trajectory.num_generated_tokens, limit, buffer) if buffer else None


def overlong_penalty(num_tokens: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0].

    It is 0 up to `limit - buffer` tokens, then falls linearly to -1 at `limit`, and stays -1 beyond.
    """
    excess = num_tokens - (limit - buffer)
    return -min(1.0, max(0.0, excess / buffer))


REWARD_TERMS: dict[str, Callable[[TermInput], float | None]] = {
    "outcome": outcome_term,
    "format": format_term,
    "trajectory": trajectory_term,
    "overlong": overlong_term,
}
"""Every term by its name in `Reward.parts`. A term that returns None doesn't apply and is no part of that reward."""
