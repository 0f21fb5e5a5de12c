"""Decides whether lost learners are replaced by new ones, and raises the error if they aren't."""

from __future__ import annotations

import logging

from autotraj.config.run import RunConfig
from autotraj.errors import OutOfMemory, RunError
from autotraj.memory import MemoryDeaths
from autotraj.run_folder.folder import Checkpoint, RunFolder, newest
from learners.errors import AllocationFailed, LearnerDied, LearnerError, LearnerTimeout

logger = logging.getLogger(__name__)


class Replacements:
    """Counts the replacements of one stage, which has its checkpoints in `folder`. Make it before the learners start."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._limit = config.grpo.max_learner_restarts
        self._folder = folder
        self._memory_deaths = MemoryDeaths()
        self.count = 0

    def checkpoint_after(self, error: LearnerError, *, replaceable: bool = True) -> Checkpoint | None:
        """The checkpoint that new learners go on from; None: from the start.

        Raises RunError, which says how to go on, if the learners raised an error instead of being lost, if they were lost
        too often, or if this kind of learners can't be replaced.
        """
        go_on = self._folder.way_on
        if isinstance(error, AllocationFailed):
            raise OutOfMemory(f"{error}. {go_on}") from error
        lost = isinstance(error, LearnerDied | LearnerTimeout)
        if lost and self._memory_deaths.note(error) and self._memory_deaths.count > 1:
            raise OutOfMemory(
                f"learners were ended because of memory {self._memory_deaths.count} times: {error}. {go_on}"
            )
        if not lost or not replaceable or self.count >= self._limit:
            raise RunError(f"{error}. {go_on}") from error
        self.count += 1
        checkpoint = newest(self._folder.location)
        logger.warning(
            "%s; new learners go on from %s (%d of grpo.max_learner_restarts = %d)",
            error, f"step {checkpoint.step}" if checkpoint else "the start", self.count, self._limit,
        )  # fmt: skip
        return checkpoint
