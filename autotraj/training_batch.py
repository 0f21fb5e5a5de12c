"""From scored groups to what the learners train on. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learners.advantages import group_relative, has_variance
from learners.batching import Sample
from learners.config import Algorithm, LossConfig
from trajectory.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """One step's groups, and the samples of those that carry a gradient."""

    groups: list[Group]
    samples: list[Sample]
    num_no_variance: int  # groups whose rewards are all equal: their advantages would all be 0


TOKEN_MEAN: frozenset[Algorithm] = frozenset({"dapo", "cispo"})
"""Losses whose denominator counts tokens; the others count sequences."""


def assemble(groups: Sequence[Group], loss: LossConfig) -> TrainingBatch:
    """Group-relative advantages, one sample a trajectory that sampled anything; groups without variance bring none.

    Those that bring none still count: a loss is a mean over the whole step, to which they contribute zeros. As they aren't
    sent to the learners, the others' advantages are weighted by their share of the denominator. Without it the last group
    that varies would move the policy as far as a full step does.
    """
    rewards = [np.array([r.total for r in group.rewards]) for group in groups]
    varied = [(group, r) for group, r in zip(groups, rewards, strict=True) if has_variance(r)]
    advantages = group_relative([r for _, r in varied], scale=loss.reward_scale)
    counts = [[t.num_generated_tokens for t in group.trajectories] for group in groups]
    kept = [[t.num_generated_tokens for t in group.trajectories] for group, _ in varied]
    if loss.algorithm in TOKEN_MEAN:
        share = sum(map(sum, kept)) / max(sum(map(sum, counts)), 1)
    else:
        share = sum(map(len, kept)) / max(sum(map(len, counts)), 1)
    samples = [
        Sample.from_trajectory(trajectory, float(advantage) * share)
        for (group, _), group_advantages in zip(varied, advantages, strict=True)
        for trajectory, advantage in zip(group.trajectories, group_advantages, strict=True)
        if trajectory.num_generated_tokens
    ]
    return TrainingBatch(groups=list(groups), samples=samples, num_no_variance=len(groups) - len(varied))
