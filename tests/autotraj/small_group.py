"""A question small enough to follow by hand, its trajectories, and a group of them."""

import numpy as np

from trajectory.markup import render_result
from trajectory.types import Group, Task, Trajectory

TASK = Task(id="a", question="What is 2 times 3?", golds=("6",))


def trajectory(index: int, thought: str, answer: str) -> Trajectory:
    result = render_result("6\n", max_chars=100)
    call = f"<think>{thought}</think>\n<code>\nprint(2*3)\n</code>"
    text = f"{call}{result}<think>Done.</think><answer>\\boxed{{{answer}}}</answer>"
    return Trajectory(
        task_id="a",
        index=index,
        prompt_ids=np.array([1, 2], np.int32),
        response_ids=np.array([3, 4, 5], np.int32),
        loss_mask=np.array([True, False, True]),
        logprobs=np.zeros(3, np.float32),
        segments=(),
        turns=(),
        text=text,
        finish_reason="answer",
    )


GROUP = Group(
    lease_id="l", task=TASK, trajectories=tuple(trajectory(i, "Multiply.", answer) for i, answer in enumerate("6665"))
)
