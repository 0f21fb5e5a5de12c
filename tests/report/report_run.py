"""A run folder for the report's tests, built from the types and logs of a real run, and a reader of pages."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from trajectory.log import TrajectoryLog
from trajectory.types import Group, Reward, Segment, Task, ToolCall, ToolResult, Trajectory, Turn


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, text, scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.comments: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).replace("\u00a0", " ").split())


def trajectory(turns: list[Turn], text: str, index: int = 0) -> Trajectory:
    return Trajectory(
        task_id="t",
        index=index,
        prompt_ids=np.array([1], np.int32),
        response_ids=np.arange(20, dtype=np.int32),
        loss_mask=np.ones(20, np.bool_),
        logprobs=np.zeros(20, np.float32),
        segments=(Segment(start=0, end=20, policy_version=3),),
        turns=tuple(turns),
        text=text,
        finish_reason="answer",
        duration_s=1.5,
    )


def solved(thought: str = "Use the tool.", output: str = "42\n", index: int = 0) -> Trajectory:
    call = f"<think>{thought}</think><code>\nprint(6 * 7)\n</code>"
    answer = "<think>So it is.</think><answer>\\boxed{42}</answer>"
    return trajectory(
        [
            Turn(
                text=call,
                start=0,
                end=9,
                result_end=12,
                tool_call=ToolCall(tool="python", content="print(6 * 7)"),
                tool_result=ToolResult(status="ok", output=output, duration_s=0.009),
            ),
            Turn(text=answer, start=12, end=20, result_end=20),
        ],
        f"{call}\n<result>\n{output}</result>\n{answer}",
        index,
    )


def group(*trajectories: Trajectory, question: str = "What is 6 · 7?", correct: tuple[bool, ...] = ()) -> Group:
    return Group(
        lease_id="l",
        task=Task(id="t", question=question, golds=("42", "forty-two")),
        trajectories=trajectories,
        rewards=tuple(
            Reward(
                total=1.25 if ok else 0.1,
                parts={"outcome": float(ok), "format": 0.0 if ok else 0.1, "trajectory": 0.25 if ok else 0.0},
                correct=ok,
                format_ok=True,
                notes=() if ok else ("no_boxed_answer",),
            )
            for ok in correct or (True,) * len(trajectories)
        ),
    )


def write_log(path: Path, groups: list[Group]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = TrajectoryLog(path)
    for one in groups:
        log.append(one)
    log.close()


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def repair(original: str, repaired: str, question: str = "What is 6 · 7?") -> dict[str, Any]:
    return {
        "task_id": "t",
        "question": question,
        "original": original,
        "repaired": repaired,
        "problems": ["confidence", "wrong answer"],
        "quality_before": {"confidence": 0.0, "score": 0.44},
        "quality_after": {"confidence": 1.0, "score": 0.98} if repaired else {},
        "attempts": [
            {"reason": "no_tool_call", "temperature": 0.3},
            {"reason": "" if repaired else "copy", "temperature": 0.7},
        ],
    }


def make_run(run: Path) -> Path:
    """A finished run of the whole method, small, in the folder `run`."""
    stage = {"num_problems": 500, "tool_call_rate": 0.9, "seconds": 60.0}
    parts = {"outcome": 0.5, "format": 0.05, "trajectory": 0.02, "overlong": -0.01}
    run.mkdir()
    (run / "summary.json").write_text(
        json.dumps(
            {
                "stages": [
                    {
                        "name": "base",
                        "accuracy": 0.536,
                        "accuracy_ci95": 0.044,
                        "mean_reward": 0.58,
                        "reward_parts": parts,
                    }
                    | stage,
                    {"name": "sft", "accuracy": 0.81, "accuracy_ci95": 0.034, "mean_reward": 0.8, "reward_parts": parts}
                    | stage,
                    {
                        "name": "grpo",
                        "accuracy": 0.988,
                        "accuracy_ci95": 0.01,
                        "mean_reward": 1.1,
                        "reward_parts": parts,
                    }
                    | stage,
                ],
                "total_seconds": 611.0,
                "model": "examples/tiny/base",
                "seed": 7,
            }
        )
    )
    (run / "synthesis").mkdir()
    means = {"confidence": 0.6, "length": 0.5, "repetition": 0.7, "score": 0.6}
    (run / "synthesis/synthesis.json").write_text(
        json.dumps(
            {
                "num_questions": 400,
                "num_candidates": 3200,
                "num_kept": 1422,
                "num_to_repair": 1778,
                "num_repaired": 1290,
                "num_hard": 488,
                "dimensions": {"before": means, "after": dict.fromkeys(means, 1.0), "kept": means},
                "failed_attempts": {"wrong_answer": 801, "no_tool_call": 77},
                "seconds": 71.0,
            }
        )
    )
    write_lines(
        run / "synthesis/repairs.jsonl",
        [repair("<think>Maybe 41.</think>", "<think>It is 42.</think>"), repair("<think>Never.</think>", "")],
    )
    steps = range(1, 41)
    write_lines(run / "sft/metrics.jsonl", [{"step": s, "loss": 1 / s} for s in steps])
    write_lines(
        run / "reward_model/metrics.jsonl",
        [*({"step": s, "loss": 1 / s, "accuracy": 0.9} for s in steps), {"step": 40, "held_out/accuracy": 0.96}],
    )
    (run / "reward_model/metrics.json").write_text(json.dumps({"pair_accuracy": 0.962, "num_pairs": 1161}))
    write_lines(
        run / "grpo/metrics.jsonl",
        [
            {
                "step": s,
                "time": 1.0,
                "reward_mean": s / 40,
                "accuracy": s / 40,
                "sync/logprob_diff_mean": 1e-5,
                "learner/entropy": 0.1,
            }
            | {"tokens_per_second": 3000.0, "queue/leased": s % 3}
            for s in steps
        ],
    )
    for name in ("base", "sft", "grpo"):
        write_log(run / f"samples/{name}.log", [group(solved(), solved("I add.", index=1), correct=(True, False))])
    return run
