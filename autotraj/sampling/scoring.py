"""Rewards a whole group by format and outcome, and checks that every reward is a finite number."""

from __future__ import annotations

import math
from dataclasses import replace

from autotraj.errors import RewardNotFinite
from rewards import combine
from rewards.config import RewardConfig
from trajectory.types import Group, Reward, Trajectory


def score_group(group: Group, config: RewardConfig) -> Group:
    """`group` with rewards for format and outcome. May block for `config.math_timeout_s` for each answer.

    A trajectory that failed for a reason that the policy didn't cause gets reward 0, wrong, with the reason. Training
    doesn't use such groups; an evaluation counts them.

    Raises RewardNotFinite.
    """
    return checked(replace(group, rewards=tuple(_reward(group, t, config) for t in group.trajectories)))


def checked(group: Group) -> Group:
    """`group` itself. Raises RewardNotFinite, which names the term, for a reward that is NaN or infinite: with it the group
    has no mean and would look like one whose rewards are all equal."""
    for trajectory, reward in zip(group.trajectories, group.rewards, strict=True):
        bad = [f"its part {name!r} is {value}" for name, value in reward.parts.items() if not math.isfinite(value)]
        if bad or not math.isfinite(reward.total):
            why = ", ".join(bad) or f"its parts are {reward.parts}"
            raise RewardNotFinite(
                f"the reward of trajectory {trajectory.index} of task {group.task.id} is {reward.total}: {why}"
            )
    return group


def _reward(group: Group, trajectory: Trajectory, config: RewardConfig) -> Reward:
    if trajectory.failed:
        return Reward(total=0.0, parts={}, correct=False, format_ok=False, notes=(trajectory.error,))
    return combine.score(group.task, trajectory, config)
