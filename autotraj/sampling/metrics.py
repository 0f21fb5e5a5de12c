"""The metrics of a step's groups. Pure functions, no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from trajectory.ledger import Ledger
from trajectory.types import Group


def describe_groups(groups: Sequence[Group], policy_version: int) -> dict[str, float]:
    """Means over the trajectories of scored `groups`, by metric name.

    `no_verdict/*` is the share of answers that couldn't be compared with a gold answer, by reason; they count as wrong.
    `staleness_*` is `policy_version` minus the version that sampled a trajectory's oldest token.
    """
    trajectories = [t for g in groups for t in g.trajectories]
    rewards = [r for g in groups for r in g.rewards]
    if not trajectories:
        return {"num_trajectories": 0.0}
    calls = [turn.tool_result for t in trajectories for turn in t.turns if turn.tool_result is not None]
    ages = [policy_version - v for t in trajectories if (v := t.min_policy_version) is not None]
    lengths = [t.num_generated_tokens for t in trajectories]
    metrics = {
        "num_trajectories": float(len(trajectories)),
        "reward_mean": _mean([r.total for r in rewards]),
        "reward_std": float(np.std([r.total for r in rewards])) if rewards else 0.0,
        "accuracy": _mean([float(r.correct) for r in rewards]),
        "format_rate": _mean([float(r.format_ok) for r in rewards]),
        "tool_call_rate": _mean([float(t.num_tool_calls > 0) for t in trajectories]),
        "tool_calls_mean": _mean([float(t.num_tool_calls) for t in trajectories]),
        "generated_tokens_mean": _mean([float(n) for n in lengths]),
        "generated_tokens": float(sum(lengths)),
        "episode_seconds_mean": _mean([t.duration_s for t in trajectories]),
        "staleness_mean": _mean([float(a) for a in ages]),
        "staleness_max": float(max(ages, default=0)),
    }
    metrics |= {f"reward/{part}": value for part, value in reward_parts(groups).items()}
    undecided = Counter(r.no_verdict for r in rewards if r.no_verdict)
    metrics |= {f"no_verdict/{name}": count / len(rewards) for name, count in sorted(undecided.items())}
    for reason, count in sorted(Counter(t.finish_reason for t in trajectories).items()):
        metrics[f"finish/{reason}"] = count / len(trajectories)
    if calls:
        metrics["tool_seconds_mean"] = _mean([c.duration_s for c in calls])
        for status, count in sorted(Counter(c.status for c in calls).items()):
            metrics[f"tool/{status}"] = count / len(calls)
    return metrics


def describe_ledger(ledger: Ledger) -> dict[str, float]:
    """How many groups wait, and how many were dropped or handed back so far, by reason."""
    counts = ledger.counts()
    return {
        "queue/leased": float(counts.leased),
        "queue/scored": float(counts.scored),
        **{f"dropped/{reason}": float(n) for reason, n in ledger.drop_reasons.items()},
        **{f"handed_back/{reason}": float(n) for reason, n in ledger.hand_back_reasons.items()},
    }


def reward_parts(groups: Sequence[Group]) -> dict[str, float]:
    """The mean of each part of the reward."""
    rewards = [r for g in groups for r in g.rewards]
    return {
        part: _mean([r.parts.get(part, 0.0) for r in rewards]) for part in sorted({p for r in rewards for p in r.parts})
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
