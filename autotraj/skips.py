"""How many steps were skipped, one after another and in all, and when that ends a run. Pure.

A step is skipped if its loss or gradient is not finite; see `learners.skipped_steps`. One alone may be the fault of one
trajectory. Several in a row mean that the policy itself, or the setting it is trained with, is broken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from autotraj.errors import NotFinite
from learners.skipped_steps import reasons, was_applied

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3


class Skips:
    """Call `took(metrics)` after each step. `num_steps`: of the whole training, if it may be less than `MAX_IN_A_ROW`."""

    def __init__(self, num_steps: int = MAX_IN_A_ROW) -> None:
        self._limit = min(num_steps, MAX_IN_A_ROW)
        self.num_skipped = 0
        self._in_a_row = 0

    def took(self, metrics: Mapping[str, float]) -> bool:
        """Whether the step was applied. Raises NotFinite if it is the last of too many in a row that were skipped."""
        if was_applied(metrics):
            self._in_a_row = 0
            return True
        self.num_skipped += 1
        self._in_a_row += 1
        reason = " and ".join(reasons(metrics))
        logger.warning("a training step is skipped: %s", reason)
        if self._in_a_row >= self._limit:
            raise NotFinite(
                f"{self._in_a_row} training steps in a row were skipped because their loss or gradient was not finite (the "
                f"last: {reason}); the weights are as they were before them. Lower the learning rate, or check the model "
                "and its dtype; then go on from the last checkpoint, if there is one"
            )
        return False
