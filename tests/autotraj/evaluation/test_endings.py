"""What an evaluation says beside its accuracy."""

import numpy as np

from autotraj.evaluation.endings import explain
from rewards import combine
from rewards.config import RewardConfig
from trajectory.types import FinishReason, Group, Reward, Task, ToolCall, ToolResult, Trajectory, Turn

TASK = Task(id="t7", question="What is 6 times 7?", golds=("42",))
GOOD = "<think>a</think><answer>\\boxed{42}</answer>"


def trajectory(text: str, reason: FinishReason, *, tool: str = "", error: str = "") -> Trajectory:
    call = ToolCall(tool="python", content="1") if tool else None
    result = ToolResult(status=tool) if tool else None  # type: ignore[arg-type]
    return Trajectory(
        task_id=TASK.id,
        index=0,
        prompt_ids=np.zeros(1, np.int32),
        response_ids=np.zeros(3, np.int32),
        loss_mask=np.ones(3, np.bool_),
        logprobs=np.zeros(3, np.float32),
        segments=(),
        turns=(Turn(text="", start=0, end=0, result_end=0, tool_call=call, tool_result=result),),
        text=text,
        finish_reason=reason,
        error=error,
    )


def group(*trajectories: Trajectory) -> Group:
    rewards = tuple(
        Reward(total=0.0, parts={}, correct=False, format_ok=False, notes=(t.error,))
        if t.error
        else combine.score(TASK, t, RewardConfig())
        for t in trajectories
    )
    return Group(lease_id="", task=TASK, trajectories=trajectories, rewards=rewards)


def test_nothing_right_shows_form_endings_tools_and_the_end_of_one() -> None:
    rambling = "<think>" + "so " * 400 + "it goes on"
    found = explain(
        [
            group(trajectory("The answer is 42.", "eos"), trajectory(rambling, "length", tool="error")),
            group(trajectory(rambling, "length"), trajectory("<answer>\\boxed{41}</answer>", "answer", tool="ok")),
        ]
    )
    assert found[0] == "form: 4 of 4 answers have no valid form (no_think 4, no_answer 3, unpaired_tag 2)"
    assert found[1] == "episodes ended by: length 2, eos 1, answer 1"
    assert found[2] == "tool calls: error 1, ok 1"
    head, _, tail = found[3].partition("\n")
    assert head.startswith("the end of a wrong answer (task t7; gold 42; ended by length; ")
    assert tail.startswith("…")
    assert tail.endswith("it goes on")
    assert len(tail) == 601
    assert len(found) == 4


def test_mostly_right_shows_no_answer() -> None:
    found = explain([group(trajectory(GOOD, "answer"), trajectory(GOOD, "answer"), trajectory("no", "eos"))])
    assert found[0].startswith("form: 1 of 3 answers have no valid form")
    assert found[1:] == ["episodes ended by: answer 2, eos 1", "tool calls: none was made"]


def test_what_failed_is_told_apart() -> None:
    found = explain([group(trajectory("", "error", error="the engine\n  died"), trajectory(GOOD, "answer"))])
    assert found == [
        "form: 0 of 1 answers have no valid form",
        "episodes ended by: answer 1",
        "tool calls: none was made",
        "failed, and counted as wrong: 1 of 2; the first by error: the engine died",
    ]


def test_only_failures_are_explained_too() -> None:
    found = explain([group(trajectory("", "deadline", error="600 s are over"))])
    assert found[-1] == "failed, and counted as wrong: 1 of 1; the first by deadline: 600 s are over"


def test_a_models_text_can_not_drive_the_terminal() -> None:
    found = explain([group(trajectory("\x1b[2J\u202eabc", "eos"))])
    assert "\x1b" not in "".join(found)
    assert found[-1].endswith("⟦U+001B⟧[2J⟦U+202E⟧abc")


def test_an_empty_answer_says_so() -> None:
    assert explain([group(trajectory("", "eos"))])[-1].endswith("\n(it is empty)")
