"""The reward-model actor for the controller, which handles its start, deadlines, deaths, restarts and new models."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.config import ScorerConfig
from actors.reward_model.actor import RewardModelActor, RewardModelError, RewardModelTimeout, Scores
from autotraj.errors import OutOfMemory, RunError, ScoringFailed, UserError
from autotraj.loop.saved_loop import FIRST_VERSION
from autotraj.memory import MemoryDeaths
from autotraj.runners.calls import cause_of, end_actor, reason
from cluster.roles import ROLLOUT, role

logger = logging.getLogger(__name__)

SLACK_S = 5.0
"""Time for the call and its answer, in addition to the actor's own deadline, seconds."""
MAX_STARTS = 3
"""How often the actor may die before it serves for the first time."""
LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
"""Errors by which Ray reports an actor whose process is gone."""


class RewardModelUnavailable(ScoringFailed):
    """There was no score within the deadline. The message says which part waited for what."""


@dataclass(frozen=True, slots=True)
class Served:
    """The served checkpoint."""

    path: str
    version: int


class RewardModelService:
    """One `RewardModelActor`. `score` and `replace` may be called from several threads."""

    def __init__(self, config: ScorerConfig, path: str, *, version: int = FIRST_VERSION) -> None:
        self._config = config
        self._served = Served(path, version)
        self._actor: Any = None
        self._loading = (
            threading.Lock()
        )  # one load at a time, so that the last requested model is the one that is served
        self._memory_deaths = MemoryDeaths()
        self._noted = -1  # number of restarts before the last death that was handled
        self.num_restarts = 0

    @property
    def served(self) -> Served:
        return self._served

    @property
    def version(self) -> int:
        return self._served.version

    def start(self) -> None:
        """Start the actor with the checkpoint, and wait for it.

        Raises:
            UserError: the checkpoint is no reward model that can be served.
            RunError: it was not loaded in time, or the actor died again and again.
        """
        actor = ray.remote(RewardModelActor).options(
            name=f"reward-model-{uuid.uuid4().hex[:6]}",
            num_cpus=self._config.num_cpus,
            num_gpus=self._config.num_gpus,
            resources=role(ROLLOUT, by_role=self._config.place_by_role),
            max_restarts=-1,  # its state is a checkpoint on disk, which `_revive` loads again
            max_concurrency=1000,
        )
        self._actor = actor.remote(self._config)
        self._bring_up(self._served)

    def score(self, sequences: Sequence[NDArray[np.int32]]) -> Scores:
        """The scores of one group's sequences.

        Raises:
            RewardModelUnavailable: there was no score within `scorer.deadline_s`.
            OutOfMemory: the actor was ended because of memory again after it had been replaced.
        """
        deadline, last = time.monotonic() + self._config.deadline_s, ""
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
            except (*LOST, RewardModelError) as error:
                last = f"; the last time: {reason(error)}"
                logger.warning("the reward model's actor fails: %s", reason(error))
                self._revive(restarts, error)
            except ValueError as error:
                raise RewardModelUnavailable("reward_model_refused", str(error)) from error
        raise RewardModelUnavailable(
            "reward_model_down", f"the reward model's actor was down for {self._config.deadline_s:g} s{last}"
        )

    def replace(self, path: str, version: int) -> None:
        """Serve another checkpoint from now on, newer or, after a set-back, older. Running calls get the score of the one
        before. Raises RunError."""
        with self._loading:
            served = Served(path, version)
            self._bring_up(served)
            self._served = served

    def stop(self) -> None:
        if self._actor is not None:
            end_actor(self._actor)
            self._actor = None

    def _bring_up(self, served: Served) -> None:
        """Load `served` in the actor, also if its process dies meanwhile. Waits. Raises RunError, UserError, OutOfMemory."""
        for attempt in range(1, MAX_STARTS + 1):
            try:
                self._load(served)
                return
            except RunError as error:
                if attempt == MAX_STARTS or not isinstance(error.__cause__, LOST):
                    raise
                self._note_memory(error.__cause__)
                logger.warning("%s; it is started again", error)

    def _load(self, served: Served) -> None:
        path, limit = served.path, self._config.load_timeout_s
        try:
            ray.get(self._actor.start.remote(path, served.version), timeout=limit + SLACK_S)
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"the reward model at {path} was not loaded within {limit:g} s") from None
        except (ray.exceptions.RayError, RewardModelError, ValueError) as error:
            message = f"the reward model at {path} can't be served: {reason(error)}"
            if self._served is served and self.num_restarts == 0 and isinstance(cause_of(error), ValueError):
                raise UserError(message) from error
            raise RunError(message) from error

    def _note_memory(self, error: BaseException) -> None:
        if isinstance(error, Exception) and self._memory_deaths.note(error) and self._memory_deaths.count > 1:
            raise OutOfMemory(f"the reward model's actor was ended because of memory {self._memory_deaths.count} times")

    def _revive(self, restarts: int, error: Exception) -> None:
        """Load the checkpoint again after Ray has restarted the actor; one thread does it for all."""
        with self._loading:
            if self.num_restarts != restarts:
                return
            if self._noted != restarts:  # several threads hear of one death
                self._noted = restarts
                self._note_memory(error)
            time.sleep(0.5)  # Ray is at it
            try:
                self._load(self._served)
                self.num_restarts += 1
            except (RunError, UserError) as failed:
                logger.warning("%s", failed)
