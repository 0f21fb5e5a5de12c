"""Makes the learners' samples from scored groups. Pure functions."""

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
    """One step's groups, with one sample for each trajectory."""

    groups: list[Group]
    samples: list[Sample]
    num_no_variance: int  # groups whose rewards are all equal, so that their advantages are all 0
    has_gradient: bool  # whether any sample has a gradient


def assemble(groups: Sequence[Group], loss: LossConfig, policy_version: int) -> TrainingBatch:
    """Group-relative advantages, with one sample for each trajectory. `policy_version`: the learner's, before the step.

    Groups without variance are included: the loss is a mean over the whole step, to which they contribute zeros, and a KL
    penalty applies to them, too. The learners pass only samples with a gradient through the model.
    """
    rewards = [np.array([r.total for r in group.rewards]) for group in groups]
    advantages = group_relative(rewards, scale=loss.reward_scale)
    samples = [
        Sample.from_trajectory(trajectory, float(advantage), policy_version)
        for group, group_advantages in zip(groups, advantages, strict=True)
        for trajectory, advantage in zip(group.trajectories, group_advantages, strict=True)
    ]
    return TrainingBatch(
        groups=list(groups),
        samples=samples,
        num_no_variance=sum(not has_variance(r) for r in rewards),
        has_gradient=any(has_gradient(sample, with_kl=loss.kl_coef > 0) for sample in samples),
    )
