"""Sampled trajectories of a length, an answer and an ending, and their groups, scored by the rule reward."""

import numpy as np

from rewards import combine
from rewards.config import RewardConfig
from trajectory.types import FinishReason, Group, Reward, Task, ToolCall, Trajectory, Turn


def trajectory(
    index: int, answer: str, *, num_tokens: int = 10, num_calls: int = 0, reason: FinishReason = "answer"
) -> Trajectory:
    call = Turn(text="", start=0, end=0, result_end=0, tool_call=ToolCall(tool="python", content="1"))
    return Trajectory(
        task_id="t",
        index=index,
        prompt_ids=np.zeros(1, np.int32),
        response_ids=np.zeros(num_tokens, np.int32),
        loss_mask=np.ones(num_tokens, np.bool_),
        logprobs=np.zeros(num_tokens, np.float32),
        segments=(),
        turns=(call,) * num_calls,
        text=f"<think>a</think><answer>\\boxed{{{answer}}}</answer>",
        finish_reason=reason,
        error="lost" if reason == "error" else "",
    )


def group(task: Task, *trajectories: Trajectory) -> Group:
    rewards = tuple(
        Reward(total=0.0, parts={}, correct=False, format_ok=False)
        if t.finish_reason == "error"
        else combine.score(task, t, RewardConfig())
        for t in trajectories
    )
    return Group(lease_id="", task=task, trajectories=trajectories, rewards=rewards)


def maths(n: int) -> list[Task]:
    return [Task(id=f"m{i}", question=f"{i}?", golds=(str(i),)) for i in range(n)]
