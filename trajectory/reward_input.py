"""The tokens of a trajectory that a reward model reads. Training and serving both use this, so that they read the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trajectory.types import Trajectory


def reward_input(trajectory: Trajectory, *, mask_results: bool) -> NDArray[np.int32]:
    """Prompt and response as one sequence (P + T,); with `mask_results` without the environment's tokens."""
    return joined(trajectory.prompt_ids, trajectory.response_ids, trajectory.loss_mask, mask_results=mask_results)


def joined(
    prompt_ids: NDArray[np.int32], response_ids: NDArray[np.int32], mask: NDArray[np.bool_], *, mask_results: bool
) -> NDArray[np.int32]:
    """`reward_input` from parts: prompt (P,), response (T,), and a mask (T,) that is True on the model's own tokens."""
    assert len(response_ids) == len(mask)
    sequence: NDArray[np.int32] = np.concatenate([prompt_ids, response_ids[mask] if mask_results else response_ids])
    return sequence
