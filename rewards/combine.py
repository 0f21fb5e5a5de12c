"""One trajectory's reward from its parts, with the breakdown that a person reads."""

from __future__ import annotations

from rewards import format, outcome
from rewards.config import RewardConfig
from rewards.trajectory import trajectory_part
from trajectory import markup
from trajectory.types import Reward, Task, Trajectory


def score(task: Task, trajectory: Trajectory, config: RewardConfig, rm: float | None = None) -> Reward:
    """Rewards a finished trajectory; one that ended by `error` or `deadline` has no reward and is the caller's to drop.

    `rm` is the reward model's score: as it comes with preset "paper", normalised by the caller's `RunningNorm` with
    "default". None: there is no reward model. Raises ValueError if it counts and isn't finite.

    Parts: `outcome`, `format`, with a reward model `trajectory` and, if it is on, `overlong`; total = Σ parts. `correct`
    is about the answer alone. A trajectory cut off by a limit has no closed answer, so it is malformed; what the reward
    model says of a malformed one doesn't count. Notes name the broken rules, `malformed` if the episode ended for that,
    and why an answer couldn't be compared. The first LaTeX answer that isn't a plain number starts a process (2 s); each
    comparison blocks for `config.math_timeout_s` at most.
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
    if rm is not None:
        parts["trajectory"] = trajectory_part(task.kind, result, rm, config) if format_ok else 0.0
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
