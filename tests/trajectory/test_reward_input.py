"""What a reward model reads of a trajectory, token by token."""

import numpy as np
import pytest

from trajectory.reward_input import reward_input
from trajectory.types import Trajectory


@pytest.mark.parametrize(("mask_results", "expected"), [(True, [1, 2, 11, 14]), (False, [1, 2, 11, 12, 13, 14])])
def test_the_environments_tokens_are_left_out(mask_results: bool, expected: list[int]) -> None:
    trajectory = Trajectory(
        task_id="t",
        index=0,
        prompt_ids=np.array([1, 2], np.int32),
        response_ids=np.array([11, 12, 13, 14], np.int32),
        loss_mask=np.array([True, False, False, True]),
        logprobs=np.zeros(4, np.float32),
        segments=(),
        turns=(),
        text="",
        finish_reason="answer",
    )
    ids = reward_input(trajectory, mask_results=mask_results)
    assert ids.dtype == np.int32
    assert ids.tolist() == expected
