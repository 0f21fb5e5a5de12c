"""Measuring a policy: sample the evaluation tasks on the rollout actors, score them, say how sure we are."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from autotraj.config import EvalConfig
from autotraj.runner_pool import RunnerPool
from autotraj.scoring import score_group
from autotraj.step_metrics import describe_groups
from rewards.config import RewardConfig
from trajectory.types import Group, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """What one evaluation found. Trajectories that failed for reasons not the policy's own count as wrong."""

    name: str
    accuracy: float  # mean over all sampled trajectories
    accuracy_ci95: float  # half-width, normal approximation over problems
    num_problems: int
    num_failed: int  # trajectories that ended in an error or at their deadline
    tool_call_rate: float
    mean_reward: float
    mean_reward_ci95: float  # half-width, as accuracy's
    seconds: float
    groups: tuple[Group, ...] = field(default=(), repr=False)

    def summary(self) -> dict[str, float | str | int]:
        """Everything but the trajectories, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "groups"}


def evaluate(
    name: str,
    pool: RunnerPool,
    tasks: Sequence[Task],
    config: EvalConfig,
    reward: RewardConfig,
    *,
    seed: int,
    timeout_s: float,
) -> EvalResult:
    """Samples `config.num_samples` trajectories a task, spread over all ready runners, within `timeout_s`."""
    started = time.monotonic()
    runner_ids = pool.ready_ids()
    shards = {
        runner_id: {
            "tasks": list(tasks[i :: len(runner_ids)]),
            "num_samples": config.num_samples,
            "temperature": config.temperature,
            "seed": seed,
        }
        for i, runner_id in enumerate(runner_ids)
    }
    groups = [group for shard in pool.map("evaluate", shards, timeout_s) for group in shard]
    scored = [score_group(group, reward) for group in groups]
    return summarize(name, scored, seconds=time.monotonic() - started)


def summarize(name: str, groups: Sequence[Group], *, seconds: float) -> EvalResult:
    """The figures of scored `groups`, one a problem."""
    metrics = describe_groups(groups, policy_version=0)
    per_problem = [sum(r.correct for r in g.rewards) / len(g.rewards) for g in groups]
    rewards = [sum(r.total for r in g.rewards) / len(g.rewards) for g in groups]
    return EvalResult(
        name=name,
        accuracy=sum(per_problem) / len(per_problem) if per_problem else 0.0,
        accuracy_ci95=_half_width(per_problem),
        num_problems=len(per_problem),
        num_failed=sum(t.finish_reason in ("error", "deadline") for g in groups for t in g.trajectories),
        tool_call_rate=metrics.get("tool_call_rate", 0.0),
        mean_reward=metrics.get("reward_mean", 0.0),
        mean_reward_ci95=_half_width(rewards),
        seconds=seconds,
        groups=tuple(groups),
    )


def _half_width(per_problem: Sequence[float]) -> float:
    """Of the mean's 95 % interval, by the normal approximation; 0 if there is nothing to tell it by."""
    n = len(per_problem)
    return 1.96 * statistics.stdev(per_problem) / math.sqrt(n) if n > 1 else 0.0
