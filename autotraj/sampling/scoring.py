"""Rewards a whole group by format, outcome and the user's own terms, and checks that every reward is a finite number."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial

from autotraj.errors import RewardNotFinite, RewardTermFailed
from rewards import combine
from rewards.config import RewardConfig, TermConfig
from rewards.own_terms import OwnTerms, TermFailed
from trajectory.types import Group, Reward, Trajectory

logger = logging.getLogger(__name__)
NUM_THREADS = 4


def score_group(group: Group, config: RewardConfig) -> Group:
    """`group` with rewards for format and outcome. May block for `config.math_timeout_s` for each answer.

    A trajectory that failed for a reason that the policy didn't cause gets reward 0, wrong, with the reason. Training
    doesn't use such groups; an evaluation counts them.

    Raises RewardNotFinite.
    """
    return checked(replace(group, rewards=tuple(_reward(group, t, config) for t in group.trajectories)))


def with_own_terms(group: Group, own: OwnTerms) -> Group:
    """`group`, which is scored, with all of the user's own terms in its rewards. Waits for each up to
    `reward.terms_timeout_s`. Raises RewardTermFailed."""
    for term in own.terms:
        group = _with_term(own, term, group)
    return group


def evaluated_with_own_terms(groups: Sequence[Group], config: RewardConfig) -> list[Group]:
    """The scored `groups` of an evaluation with the user's own terms. A term that fails on one of them is left out of all,
    with a warning: a mean over the others would not say what it is a mean of."""
    found = list(groups)
    with closing(OwnTerms(config)) as own, ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="terms") as threads:
        for term in own.terms:
            try:
                found = list(threads.map(partial(_with_term, own, term), found))
            except RewardTermFailed as error:
                logger.warning("the evaluation is without the reward term %s: %s", term.name, error)
    return found


def _with_term(own: OwnTerms, term: TermConfig, group: Group) -> Group:
    places = [place for place, trajectory in enumerate(group.trajectories) if not trajectory.failed]
    if not places:
        return group
    given = replace(
        group,
        trajectories=tuple(group.trajectories[place] for place in places),
        rewards=tuple(group.rewards[place] for place in places),
    )
    try:
        values = own.values(term, given)
    except TermFailed as error:
        raise RewardTermFailed(term.name, f"task {group.task.id}: {error}") from error
    rewards = list(group.rewards)
    for place, (value, note) in zip(places, values, strict=True):
        before = rewards[place]
        parts = before.parts | {term.name: term.weight * value}
        notes = (*before.notes, f"{term.name}: {note}") if note else before.notes
        rewards[place] = replace(before, parts=parts, total=sum(parts.values()), notes=notes)
    return replace(group, rewards=tuple(rewards))


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
