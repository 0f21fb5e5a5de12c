"""Measures the gain of sampling while training: wall time of 10 steps at max_staleness 1 over that at max_staleness 0.

    python -m benchmarks.overlap [--steps 10] [--rounds 2]

Both arms run in turn in one session, on the tiny model with real engines, learners and sandbox; every tool call waits for
a drawn latency first (`benchmarks.tool_latency`). A warm-up step of each arm is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

from autotraj.config.run import load
from autotraj.gateways.session import GatewayAccess
from autotraj.launch import run_session
from autotraj.loop.grpo import GRPOConfig
from benchmarks.tool_latency import SlowToolActor


def seconds(gateway: GatewayAccess, *, max_staleness: int, steps: int) -> tuple[float, float]:
    """Wall time of `steps` steps, and their mean staleness."""
    config = load("examples/tiny/grpo.toml", [f"grpo.max_staleness={max_staleness}"])
    settings = GRPOConfig().run(config, sandbox_address=gateway.address, sandbox_token=gateway.token)
    algo = settings.env_runners(env_runner_cls=SlowToolActor).build_algo()
    try:
        algo.train()
        started = time.monotonic()
        staleness = [algo.train()["grpo"]["staleness_mean"] for _ in range(steps)]
        return time.monotonic() - started, statistics.mean(staleness)
    finally:
        algo.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    ratios = []
    with run_session(load("examples/tiny/grpo.toml")) as gateway:
        for i in range(args.rounds):
            strict, _ = seconds(gateway, max_staleness=0, steps=args.steps)
            overlapped, staleness = seconds(gateway, max_staleness=1, steps=args.steps)
            ratios.append(overlapped / strict)
            print(
                f"round {i + 1}: max_staleness=0 {strict:.1f} s, max_staleness=1 {overlapped:.1f} s "
                f"(mean staleness {staleness:.2f}), ratio {ratios[-1]:.2f}"
            )
    print(f"median ratio {statistics.median(ratios):.2f} over {args.rounds} rounds of {args.steps} steps")


if __name__ == "__main__":
    main()
