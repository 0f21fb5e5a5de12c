"""Counts skipped steps, in a row and in all, and ends a run that skips too many. Pure.

An optimizer step is skipped if its loss or gradient is not finite; see `learners.skipped_steps`. One alone may be the fault
of one trajectory. Several in a row mean that the policy itself, or the setting it is trained with, is broken.

A training step of several minibatches may be skipped in part. It counts in the row, too: the same trajectories in one
minibatch would have skipped all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from autotraj.errors import NotFinite
from learners.skipped_steps import SAMPLES, reasons, was_applied

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3


class Skips:
    """Call `took(metrics)` after each step. `num_steps`: steps of the whole training, if it may be below `MAX_IN_A_ROW`."""

    def __init__(self, num_steps: int = MAX_IN_A_ROW) -> None:
        self._limit = min(num_steps, MAX_IN_A_ROW)
        self.num_skipped = 0  # as a whole
        self.num_in_part = 0
        self.num_samples = 0  # left out by steps that were skipped in part
        self._in_a_row = 0

    def took(self, metrics: Mapping[str, float]) -> bool:
        """Whether the step was applied, at least in part. Raises NotFinite if too many in a row were skipped, as a whole or
        in part."""
        applied, why = was_applied(metrics), reasons(metrics)
        if applied and not why:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        reason = " and ".join(why)
        if applied:
            self.num_in_part += 1
            num_samples = int(metrics.get(SAMPLES, 0))
            self.num_samples += num_samples
            logger.warning("a training step is skipped in part: %s; %d samples are not trained on", reason, num_samples)
        else:
            self.num_skipped += 1
            logger.warning("a training step is skipped: %s", reason)
        if self._in_a_row >= self._limit:
            raise NotFinite(
                f"{self._in_a_row} training steps in a row were skipped, whole or in part, because their loss or gradient "
                f"was not finite (the last: {reason}); what was skipped has changed no weight. Lower the learning rate, or "
                "check the model and its dtype; then go on from the last checkpoint, if there is one"
            )
        return applied

    def metrics(self) -> dict[str, float]:
        """The counts so far."""
        return {
            "steps_skipped": float(self.num_skipped),
            "steps_skipped_in_part": float(self.num_in_part),
            "samples_skipped": float(self.num_samples),
        }
