"""Computes one trajectory's reward from its terms, with a breakdown for people."""

from __future__ import annotations

from rewards import outcome
from rewards.config import RewardConfig
from rewards.terms import REWARD_TERMS, TermInput
from trajectory import markup
from trajectory.types import Reward, Task, Trajectory


def score(task: Task, trajectory: Trajectory, config: RewardConfig, rm: float | None = None) -> Reward:
    """Reward a finished trajectory. One that ended by `error` or `deadline` has no reward, and the caller must drop it.

    `rm` is the reward model's score: raw with preset "paper", normalised by the caller's `RunningNorm` with "default".
    None: there is no reward model. Raises ValueError if the score counts and isn't finite.

    Parts are the terms of `REWARD_TERMS` that apply, and the total is their sum. `correct` is about the answer alone. A
    trajectory that a limit cut off has no closed answer, so it is malformed; the reward model's score of a malformed one
    doesn't count. Notes name the broken rules, `malformed` if the episode ended for that, and why an answer couldn't be
    compared. The first LaTeX answer that isn't a plain number starts a process (2 s). Each comparison blocks for at most
    `config.math_timeout_s`.
    """
    assert not trajectory.failed, "there is nothing to reward"
    problems = markup.validate(trajectory.text)
    format_ok = not problems and trajectory.finish_reason != "malformed"
    result = outcome.score_answer(markup.final_answer(trajectory.text), task, config.math_timeout_s)
    given = TermInput(task=task, trajectory=trajectory, format_ok=format_ok, result=result, rm=rm, config=config)
    terms = {name: term(given) for name, term in REWARD_TERMS.items()}
    parts = {name: value for name, value in terms.items() if value is not None}
    malformed = ("malformed",) if trajectory.finish_reason == "malformed" else ()
    return Reward(
        total=sum(parts.values()),
        parts=parts,
        correct=result.correct,
        format_ok=format_ok,
        notes=(*malformed, *problems, *((result.note,) if result.note else ())),
        no_verdict=result.no_verdict,
    )
