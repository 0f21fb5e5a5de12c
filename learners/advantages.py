"""Computes advantages from rewards, without a critic, relative to the other trajectories of the same group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

STD_FLOOR = 1e-4  # added to the divisor, as in TRL, so that a nearly constant group doesn't get huge advantages


def group_relative(
    rewards: Sequence[NDArray[np.floating]], scale: Literal["std", "none", "batch"] = "std"
) -> list[NDArray[np.float32]]:
    """Advantages of a batch of groups.

    Args:
        rewards: one array (G,) for each group; groups may differ in size.
        scale: `std` divides by the group's standard deviation (GRPO; sample estimate, n − 1), `none` does not
            (Dr. GRPO: no bias towards easy and hard tasks), `batch` divides by that of all rewards in the batch.

    Returns:
        One array (G,) for each group: (r − mean of its group) / (scale + 1e-4); exactly 0 in a group without variance.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in rewards]
    # Equal rewards may differ from their mean by rounding, which a small divisor would turn into an advantage.
    centred = [group - group.mean() if has_variance(group) else np.zeros_like(group) for group in groups]
    if scale == "none":
        scaled = centred
    elif scale == "batch":
        divisor = _std(np.concatenate(groups)) + STD_FLOOR if groups else 1.0
        scaled = [group / divisor for group in centred]
    else:
        scaled = [c / (_std(group) + STD_FLOOR) for c, group in zip(centred, groups, strict=True)]
    return [group.astype(np.float32) for group in scaled]


def has_variance(rewards: NDArray[np.floating]) -> bool:
    """Whether the rewards of a group (G,) differ. If they are equal, every advantage is 0 (DAPO drops such groups)."""
    return bool(np.ptp(rewards) > 1e-8) if len(rewards) else False


def _std(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
