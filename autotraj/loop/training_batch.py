"""From scored groups to what the learners train on. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learners.advantages import group_relative, has_variance
from learners.batching import Sample, has_gradient
from learners.config import LossConfig
from trajectory.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """One step's groups, and one sample a trajectory."""

    groups: list[Group]
    samples: list[Sample]
    num_no_variance: int  # groups whose rewards are all equal: their advantages are all 0
    has_gradient: bool  # whether there is anything to learn from


def assemble(groups: Sequence[Group], loss: LossConfig) -> TrainingBatch:
    """Group-relative advantages, a sample a trajectory.

    Groups without variance are among the samples: a loss is a mean over the whole step, to which they contribute zeros, and
    a KL penalty holds for them as for all others. The learners pass only what has a gradient through the model.
    """
    rewards = [np.array([r.total for r in group.rewards]) for group in groups]
    advantages = group_relative(rewards, scale=loss.reward_scale)
    samples = [
        Sample.from_trajectory(trajectory, float(advantage))
        for group, group_advantages in zip(groups, advantages, strict=True)
        for trajectory, advantage in zip(group.trajectories, group_advantages, strict=True)
    ]
    return TrainingBatch(
        groups=list(groups),
        samples=samples,
        num_no_variance=sum(not has_variance(r) for r in rewards),
        has_gradient=any(has_gradient(sample, with_kl=loss.kl_coef > 0) for sample in samples),
    )
