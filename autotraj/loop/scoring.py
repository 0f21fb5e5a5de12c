"""Computes the rewards of whole groups with a reward model, whose scores are normalised by their running mean."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from actors.reward_model.actor import Scores
from autotraj.loop.reward_service import RewardModelService, RewardModelUnavailable
from autotraj.loop.saved_loop import FIRST_VERSION
from autotraj.sampling.scoring import checked, score_group
from rewards import combine
from rewards.config import RewardConfig
from rewards.trajectory import RunningNorm
from trajectory.reward_input import reward_input
from trajectory.types import Group

VERSION_METRIC = "reward_model_version"
"""Key in `Group.metrics` for the version of the reward model that scored the group."""


class Scorer:
    """Scores groups with the reward model, from several threads."""

    def __init__(
        self, config: RewardConfig, service: RewardModelService, *, mask_results: bool, required: bool
    ) -> None:
        """With `required`, a group that the model can't score gets no rewards; else it is scored without, with a note."""
        self._config = config
        self._service = service
        self._mask_results = mask_results
        self._required = required
        self._lock = threading.Lock()
        self._norm = RunningNorm(clip=config.trajectory_clip)
        self._norm_version = service.version
        self.num_scored_without = 0

    def score(self, group: Group) -> Group:
        """`group` with rewards. Raises RewardModelUnavailable if the model is required and doesn't answer, or
        RewardNotFinite."""
        sequences = [reward_input(t, mask_results=self._mask_results) for t in group.trajectories]
        try:
            scores = self._service.score(sequences)
        except RewardModelUnavailable as error:
            if self._required:
                raise
            return self._without(group, str(error))
        rewards = tuple(
            combine.score(group.task, trajectory, self._config, rm)
            for trajectory, rm in zip(group.trajectories, self._measured(scores), strict=True)
        )
        raw = [float(value) for value in scores.values]
        metrics = group.metrics | {VERSION_METRIC: float(scores.version), "reward_model_mean": sum(raw) / len(raw)}
        return checked(replace(group, rewards=rewards, metrics=metrics))

    def metrics(self) -> dict[str, float]:
        return {
            VERSION_METRIC: float(self._service.version),
            "reward_model_restarts": float(self._service.num_restarts),
            "groups_scored_without": float(self.num_scored_without),
        }

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: which model scores, and the normalisation of its scores."""
        with self._lock:
            norm = self._norm.state()
            norm_version = self._norm_version
        served = self._service.served
        return {"norm": norm, "norm_version": norm_version, "version": served.version, "path": served.path}

    def restore(self, state: dict[str, Any] | None, path: str) -> None:
        """Restore a state (None: that of the start), with its model, which is now at `path`. Raises RunError."""
        version = state["version"] if state else FIRST_VERSION
        if version != self._service.version:
            self._service.replace(path, version)
        with self._lock:
            self._norm, self._norm_version = RunningNorm(clip=self._config.trajectory_clip), version
            if state and state.get("norm_version", version) == version:
                self._norm.restore(state["norm"])

    def _measured(self, scores: Scores) -> list[float]:
        """The scores for `combine.score`: raw with preset `paper`, else normalised by this model's mean and deviation."""
        values = [float(value) for value in scores.values]
        if self._config.preset == "paper":
            return values
        with self._lock:
            if scores.version == self._service.version != self._norm_version:  # another model has another scale
                self._norm, self._norm_version = RunningNorm(clip=self._config.trajectory_clip), scores.version
            if scores.version == self._norm_version:  # otherwise the call began before the model was replaced
                self._norm.update(values)
            return [self._norm.normalise(value) for value in values]

    def _without(self, group: Group, why: str) -> Group:
        self.num_scored_without += 1
        scored = score_group(group, self._config)
        note = f"scored without the reward model: {why}"
        return replace(scored, rewards=tuple(replace(r, notes=(*r.notes, note)) for r in scored.rewards))
