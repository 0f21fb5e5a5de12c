"""One trajectory's reward from its parts, with the breakdown that a person reads."""

from __future__ import annotations

from rewards import format, outcome
from rewards.config import RewardConfig
from trajectory import markup
from trajectory.types import Reward, Task, Trajectory


def score(task: Task, trajectory: Trajectory, config: RewardConfig) -> Reward:
    """Rewards a finished trajectory; one that ended by `error` or `deadline` has no reward and is the caller's to drop.

    Parts: `outcome`, `format` and, if it is on, `overlong`; total = Σ parts. `correct` is about the answer alone. A
    trajectory cut off by a limit has no closed answer, so it is malformed. Notes name the broken rules, `malformed` if
    the episode ended for that, and why an answer couldn't be compared. The first LaTeX answer that isn't a plain number
    starts a process (2 s); each comparison blocks for `config.math_timeout_s` at most.
    """
    assert trajectory.finish_reason not in ("error", "deadline"), "there is nothing to reward"
    form = format.check(trajectory.text)
    format_ok = form.ok and trajectory.finish_reason != "malformed"
    result = outcome.score(markup.final_answer(trajectory.text), task, config.math_timeout_s)
    if format_ok:
        wrong_math = task.kind == "math" and not result.correct
        parts = {
            "outcome": config.outcome_weight * result.value,
            "format": config.wrong_but_well_formed if wrong_math else 0.0,
        }
    else:
        bad_format = config.bad_format_math if task.kind == "math" else config.bad_format_qa
        parts = {"outcome": 0.0, "format": bad_format}
    if config.overlong_buffer_tokens:
        parts["overlong"] = overlong_penalty(
            trajectory.num_generated_tokens, config.overlong_limit_tokens, config.overlong_buffer_tokens
        )
    malformed = ("malformed",) if trajectory.finish_reason == "malformed" else ()
    return Reward(
        total=sum(parts.values()),
        parts=parts,
        correct=result.correct,
        format_ok=format_ok,
        notes=(*malformed, *form.problems, *((result.note,) if result.note else ())),
    )


def overlong_penalty(num_tokens: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0].

    0 up to `limit - buffer` tokens, from there linear to -1 at `limit`, and -1 beyond.
    """
    excess = num_tokens - (limit - buffer)
    return -min(1.0, max(0.0, excess / buffer))
