"""Explains an evaluation in a few lines: the form of the answers, how episodes ended, and a wrong answer as an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from report.text import visible
from trajectory.types import Group, Reward, Task, Trajectory

EXAMPLE_BELOW = 0.5
"""If the share of right answers is below this, a wrong one is shown."""
TAIL_CHARS = 600

Sampled = tuple[Task, Trajectory, Reward]


def explain(groups: Sequence[Group]) -> list[str]:
    """Lines about scored `groups`: form, endings, tools, failures, and the end of a wrong answer if most are wrong."""
    sampled = [
        (group.task, trajectory, reward)
        for group in groups
        for trajectory, reward in zip(group.trajectories, group.rewards, strict=True)
    ]
    answered = [s for s in sampled if not s[1].failed]
    failed = [s for s in sampled if s[1].failed]
    malformed = [reward for _, _, reward in answered if not reward.format_ok]
    lines = []
    if answered:
        broken = _counted(note for reward in malformed for note in dict.fromkeys(reward.notes))
        lines.append(
            f"form: {len(malformed)} of {len(answered)} answers have no valid form"
            + (f" ({broken})" if malformed else "")
        )
        lines.append(f"episodes ended by: {_counted(trajectory.finish_reason for _, trajectory, _ in answered)}")
    calls = [turn.tool_result for _, t, _ in sampled for turn in t.turns if turn.tool_result is not None]
    lines.append(f"tool calls: {_counted(call.status for call in calls) if calls else 'none was made'}")
    if failed:
        _, first, _ = failed[0]
        why = visible(" ".join(first.error.split()))[:300]
        lines.append(
            f"failed, and counted as wrong: {len(failed)} of {len(sampled)}; the first by {first.finish_reason}: {why}"
        )
    num_right = sum(reward.correct for _, _, reward in sampled)
    if num_right < EXAMPLE_BELOW * len(sampled) and (wrong := _typical(answered)) is not None:
        lines.append(_shown(*wrong))
    return lines


def _typical(answered: Sequence[Sampled]) -> Sampled | None:
    """The first wrong answer among those with the most frequent ending and, of these, the most frequent faults of form."""
    wrong = [s for s in answered if not s[2].correct]
    kinds = Counter((trajectory.finish_reason, reward.notes) for _, trajectory, reward in wrong)
    if not kinds:
        return None
    (most, _), *_ = kinds.most_common(1)
    return next(s for s in wrong if (s[1].finish_reason, s[2].notes) == most)


def _shown(task: Task, trajectory: Trajectory, reward: Reward) -> str:
    """The end of a wrong answer as text. A model's text is hostile, also to a terminal, so `visible` spells out controls."""
    text = trajectory.text.strip()
    tail = ("…" if len(text) > TAIL_CHARS else "") + text[-TAIL_CHARS:]
    notes = f"; {', '.join(reward.notes)}" if reward.notes else ""
    return (
        f"the end of a wrong answer (task {visible(task.id)}; gold {visible(' or '.join(task.golds))[:200]}; ended by "
        f"{trajectory.finish_reason}{notes}):\n{visible(tail) if text else '(it is empty)'}"
    )


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{visible(name)} {count}" for name, count in Counter(names).most_common(8))
