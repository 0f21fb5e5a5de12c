"""A question, bad trajectories of it, and what a repairer may write; shared by the repair tests."""

import numpy as np

from actors.repair.types import RepairRequest
from rewards import quality
from rewards.config import QualityConfig
from trajectory.types import EpisodeError, FinishReason, Task, ToolCall, ToolResult, Trajectory, Turn

TASK = Task(id="t", question="How much is 17 times {23}?", golds=("391",))
RESULT = "\n<result>\n391\n</result>\n"
CALL = "<think>I multiply 17 by 23.</think>\n<code>\nprint(17 * 23)\n</code>"
ANSWER = "<think>The code gives 391.</think>\n<answer>\\boxed{391}</answer>"
GOOD = CALL + RESULT + ANSWER
RAMBLING = CALL.replace("I multiply", "Maybe I multiply, perhaps not,") + RESULT + ANSWER
WRONG = CALL.replace("* 23", "* 24") + RESULT.replace("391", "408") + ANSWER.replace("391", "408")
OK = ToolResult(status="ok", output="391\n")


def make_trajectory(
    text: str,
    *,
    results: tuple[ToolResult, ...] = (OK,),
    finish_reason: FinishReason = "answer",
    error: str = "",
    error_kind: EpisodeError | None = None,
    turn_texts: tuple[str, ...] = (),
) -> Trajectory:
    """With one turn a result and a last one without; what the turns say matters only where `turn_texts` are given."""
    call = ToolCall(tool="python", content="x")
    texts = turn_texts or ("",) * (len(results) + 1)
    turns = [
        Turn(
            text=texts[i],
            start=0,
            end=0,
            result_end=0,
            tool_call=call if i < len(results) else None,
            tool_result=results[i] if i < len(results) else None,
        )
        for i in range(len(texts))
    ]
    return Trajectory(
        task_id="t",
        index=2,
        prompt_ids=np.array([5, 6, 7], np.int32),
        response_ids=np.array([1, 2, 3], np.int32),
        loss_mask=np.array([True, False, True], np.bool_),
        logprobs=np.array([-1.0, 0.0, -1.0], np.float32),
        segments=(),
        turns=tuple(turns),
        text=text,
        finish_reason=finish_reason,
        error=error,
        error_kind=error_kind,
    )


def make_request(text: str = WRONG, *, correct: bool = False, **changes: object) -> RepairRequest:
    trajectory = make_trajectory(text)
    ideal = 0 if not correct else len(GOOD.split())
    fields = {
        "task": TASK,
        "trajectory": trajectory,
        "correct": correct,
        "quality": quality.assess(trajectory, TASK, ideal, QualityConfig()),
        "wrong_answer": not correct,
        "notes": (),
        "low_dimensions": ("confidence",) if correct else (),
    }
    return RepairRequest(**(fields | changes))  # type: ignore[arg-type]
