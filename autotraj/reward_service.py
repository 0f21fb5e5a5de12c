"""The reward-model actor as the controller sees it: it comes up, answers in time, dies, comes back, is replaced."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.config import RewardModelConfig
from actors.reward_model import RewardModelActor, RewardModelError, RewardModelTimeout, Scores
from autotraj.errors import RunError
from cluster.roles import ROLLOUT, role

logger = logging.getLogger(__name__)

SLACK_S = 5.0
"""Beyond the actor's own deadline: the way to it and back."""


class RewardModelUnavailable(Exception):
    """No score within the deadline. `reason` is a short name for counting; the message says who waited on whom."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RewardModelService:
    """One `RewardModelActor`. `score` may be called from several threads."""

    def __init__(self, config: RewardModelConfig, path: str, *, version: int = 1) -> None:
        self._config = config
        self._path = path
        self._version = version
        self._actor: Any = None
        self._reviving = threading.Lock()
        self.num_restarts = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def path(self) -> str:
        """The checkpoint that is served."""
        return self._path

    def start(self) -> None:
        """Bring the actor up with the checkpoint; waits. Raises RunError."""
        actor = ray.remote(RewardModelActor).options(
            name=f"reward-model-{uuid.uuid4().hex[:6]}",
            num_cpus=self._config.num_cpus,
            num_gpus=self._config.num_gpus,
            resources=role(ROLLOUT, by_role=self._config.place_by_role),
            max_restarts=-1,  # its state is a checkpoint on disk: `_revive` loads it again
            max_concurrency=1000,
        )
        self._actor = actor.remote(self._config)
        self._load("start", self._path, self._version)

    def score(self, sequences: Sequence[NDArray[np.int32]]) -> Scores:
        """The scores of one group's sequences. Raises RewardModelUnavailable, at the latest at `scorer.deadline_s`."""
        deadline = time.monotonic() + self._config.deadline_s
        while (left := deadline - time.monotonic()) > 0:
            actor, restarts = self._actor, self.num_restarts
            try:
                scores: Scores = ray.get(actor.score.remote(list(sequences), left), timeout=left + SLACK_S)
                return scores
            except RewardModelTimeout as error:
                raise RewardModelUnavailable("reward_model_timeout", str(error)) from error
            except ray.exceptions.GetTimeoutError as error:
                raise RewardModelUnavailable(
                    "reward_model_timeout", f"the reward model's actor did not answer within {left:.1f} s"
                ) from error
            except (ray.exceptions.RayActorError, RewardModelError) as error:
                logger.warning("the reward model's actor fails: %s", str(error).splitlines()[0])
                self._revive(restarts)
            except ValueError as error:
                raise RewardModelUnavailable("reward_model_refused", str(error)) from error
        raise RewardModelUnavailable(
            "reward_model_down", f"the reward model's actor was down for {self._config.deadline_s:g} s"
        )

    def replace(self, path: str, version: int) -> None:
        """Serve another checkpoint from now on; calls under way get the score of the one before. Raises RunError."""
        self._load("load", path, version)
        self._path, self._version = path, version

    def stop(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _load(self, method: str, path: str, version: int) -> None:
        limit = self._config.load_timeout_s
        try:
            ray.get(getattr(self._actor, method).remote(path, version), timeout=limit + SLACK_S)
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"the reward model at {path} was not loaded within {limit:g} s") from None
        except (ray.exceptions.RayError, RewardModelError, ValueError) as error:
            raise RunError(f"the reward model at {path} can't be served: {error}") from error

    def _revive(self, restarts: int) -> None:
        """Load the checkpoint again after Ray has restarted the actor; one thread does it for all."""
        with self._reviving:
            if self.num_restarts != restarts:
                return
            time.sleep(0.5)  # Ray is at it
            try:
                self._load("start", self._path, self._version)
                self.num_restarts += 1
            except RunError as error:
                logger.warning("%s", str(error).splitlines()[0])
