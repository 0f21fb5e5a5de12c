"""A reward term of one's own: of two right answers the shorter one earns more."""

from trajectory.types import Task, Trajectory


def brevity(task: Task, trajectory: Trajectory) -> float:
    """1 for nothing written, 0 from 160 tokens on."""
    return 1.0 - min(trajectory.num_generated_tokens / 160, 1.0)


if __name__ == "__main__":
    import sys

    from autotraj.__main__ import main

    raise SystemExit(main(["grpo", "--config", "examples/own/reward.toml", *sys.argv[1:]]))
