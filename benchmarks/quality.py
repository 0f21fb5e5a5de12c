"""Measures how fast stage 1 scores: trajectories/s on one core.

    python -m benchmarks.quality [--trajectories 20000] [--rounds 5]

Generated trajectories of about 60 words, all different, one in ten with a doubt in a `<think>`; `assess` with the paper's
three dimensions and with all five. The median of the rounds is what counts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import numpy as np

from rewards import quality
from rewards.config import QualityConfig
from rewards.dimensions import DIMENSIONS
from trajectory.types import Task, ToolCall, ToolResult, Trajectory, Turn

ALL = QualityConfig(weights=dict.fromkeys(DIMENSIONS, 1 / len(DIMENSIONS)))
STORY = (
    "first we need the total number of stamps so multiply bags by how many each one holds and then add those that Leo "
    "already has before he gives some to a friend which leaves fewer than at start but more after buying again"
)
WORDS = STORY.split()
IDEAL_NUM_WORDS = 50


def trajectory(number: int, rng: random.Random) -> Trajectory:
    a, b, c = (rng.randrange(100, 1000) for _ in range(3))
    thought = [rng.choice(WORDS) for _ in range(rng.randrange(25, 45))]
    if rng.random() < 0.1:
        thought[rng.randrange(len(thought))] = "maybe"
    output = str(a + b * c)
    text = (
        f"<think>{' '.join(thought)}</think>\n<code>\nprint({a} + {b} * {c})\n</code>\n<result>\n{output}\n</result>\n"
        f"<think>The code gives {output}, so that is what {' '.join(rng.sample(WORDS, 8))}.</think>\n"
        f"<answer>The total is \\boxed{{{output}}}.</answer>"
    )
    call = ToolCall(tool="python", content=f"print({a} + {b} * {c})")
    result = ToolResult(status="ok", output=f"{output}\n")
    return Trajectory(
        task_id=str(number),
        index=0,
        prompt_ids=np.zeros(0, np.int32),
        response_ids=np.zeros(0, np.int32),
        loss_mask=np.zeros(0, np.bool_),
        logprobs=np.zeros(0, np.float32),
        segments=(),
        turns=(Turn(text="", start=0, end=0, result_end=0, tool_call=call, tool_result=result),),
        text=text,
        finish_reason="answer",
    )


def per_second(function: Callable[[Trajectory], object], items: list[Trajectory], rounds: int) -> float:
    """Median over `rounds` of items/s of this process's CPU time: other processes on the core don't count."""
    speeds = []
    for _ in range(rounds):
        started = time.process_time()
        for item in items:
            function(item)
        speeds.append(len(items) / (time.process_time() - started))
    return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = random.Random(0)
    items = [trajectory(i, rng) for i in range(args.trajectories)]
    task = Task(id="q", question="Leo has 631 stamps and buys 98 bags of 4 stamps each. How many?", golds=("1",))
    paper = QualityConfig()
    mean_words = statistics.mean(len(item.text.split()) for item in items)
    print(f"{len(items)} trajectories of {mean_words:.0f} words on average, median of {args.rounds} rounds")
    arms: dict[str, Callable[[Trajectory], object]] = {
        "assess, the paper's three": lambda t: quality.assess(t, task, IDEAL_NUM_WORDS, paper),
        "assess, all five": lambda t: quality.assess(t, task, IDEAL_NUM_WORDS, ALL),
    }
    for name, function in arms.items():
        print(f"{name:36} {per_second(function, items, args.rounds):8,.0f} trajectories/s")


if __name__ == "__main__":
    main()
