"""From scored groups to what the learners train on. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from learners.advantages import group_relative, has_variance
from learners.batching import Sample
from trajectory.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """One step's groups, and the samples of those that carry a gradient."""

    groups: list[Group]
    samples: list[Sample]
    num_no_variance: int  # groups whose rewards are all equal: their advantages would all be 0


def assemble(groups: Sequence[Group], advantage_scale: Literal["std", "none", "batch"]) -> TrainingBatch:
    """Group-relative advantages, one sample a trajectory that sampled anything; groups without variance bring none."""
    rewards = [np.array([r.total for r in group.rewards]) for group in groups]
    varied = [(group, r) for group, r in zip(groups, rewards, strict=True) if has_variance(r)]
    advantages = group_relative([r for _, r in varied], scale=advantage_scale)
    samples = [
        Sample.from_trajectory(trajectory, float(advantage))
        for (group, _), group_advantages in zip(varied, advantages, strict=True)
        for trajectory, advantage in zip(group.trajectories, group_advantages, strict=True)
        if trajectory.num_generated_tokens
    ]
    return TrainingBatch(groups=list(groups), samples=samples, num_no_variance=len(groups) - len(varied))
