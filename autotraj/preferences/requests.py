"""Splits a scored group into candidates to keep and requests for a repairer, for `synthesize` and the online loop."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from actors.repair.types import RepairRequest
from autotraj.config.run import RunConfig
from rewards import quality
from rewards.config import QualityConfig
from rewards.quality import Candidate, Quality
from trajectory.types import Group, Reward, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """Which of a group's candidates are kept, and which are to be repaired. Numbers are indices of candidates."""

    qualities: tuple[Quality, ...]  # one a candidate
    kept: tuple[int, ...]
    to_repair: tuple[int, ...]
    requests: tuple[RepairRequest, ...]  # one for each of `to_repair`


def assess(group: Group, config: QualityConfig) -> Assessment:
    """Scores every candidate's quality, splits them (spec, stage 1, steps 3 and 4), and words what is wrong with the bad.

    The ideal length is that of the question's shortest correct candidate, for wrong ones too.
    """
    correct = [is_good(reward) for reward in group.rewards]
    ideal = quality.ideal_length([t.text for t, good in zip(group.trajectories, correct, strict=True) if good])
    qualities = tuple(quality.assess(t, group.task, ideal, config) for t in group.trajectories)
    candidates = [
        Candidate(index=i, correct=good, quality=q) for i, (good, q) in enumerate(zip(correct, qualities, strict=True))
    ]
    split = quality.split(candidates, config)
    return Assessment(
        qualities=qualities,
        kept=tuple(split.kept),
        to_repair=tuple(split.to_repair),
        requests=tuple(
            RepairRequest(
                task=group.task,
                trajectory=group.trajectories[i],
                correct=correct[i],
                quality=qualities[i],
                wrong_answer=not group.rewards[i].correct,
                notes=group.rewards[i].notes,
                low_dimensions=tuple(d for d, value in qualities[i].dimensions.items() if value < config.keep_all_from),
            )
            for i in split.to_repair
        ),
    )


def is_good(reward: Reward) -> bool:
    """Right, and well-formed: nobody should learn from a right answer in broken markup."""
    return reward.correct and reward.format_ok


def seed_of(seed: int, task: Task, attempt: int) -> int:
    """A seed for each question and attempt. It is the same in every process, whatever was done before."""
    digest = hashlib.sha256(f"{seed}/{task.id}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def timeout_s(config: RunConfig, num_requests: int) -> float:
    """The longest wait for a group's repairs: the sum of their deadlines, as they may queue, and some slack."""
    return num_requests * config.repair.deadline_s + 60.0
