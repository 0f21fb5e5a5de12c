"""Rewards for a whole group."""

from __future__ import annotations

from dataclasses import replace

from rewards import combine
from rewards.config import RewardConfig
from trajectory.types import Group


def score_group(group: Group, config: RewardConfig) -> Group:
    """`group` with a reward for each trajectory. May block for `config.math_timeout_s` an answer."""
    return replace(group, rewards=tuple(combine.score(group.task, t, config) for t in group.trajectories))
