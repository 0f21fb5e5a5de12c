"""Measures whether stage 1 keeps the engine busy: tokens/s of `synthesize`, with repairs, over those of plain vLLM.

    python -m benchmarks.synthesis [--questions 200] [--config examples/tiny/run.toml] [key=value …]

The whole stage runs as in `run`: one rollout actor, the real sandbox, scoring, splitting, repairs by the policy's engine.
Plain vLLM then samples from the same questions' prompts to their end of sequence, without stop strings, tools or turns, as
many at once as the actor may have in flight, in an engine of the same settings. Start-up isn't counted on either side.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from actors.engine.protocol import Sampling
from actors.engine.vllm import VLLMEngine
from autotraj.config.run import RunConfig, load, with_changes
from autotraj.interrupt import Interrupt
from autotraj.launch import engines, run_session
from autotraj.loop.grpo import rollout_timeout_of
from autotraj.stages.synthesize import SynthesisPass
from tasks.load import load_tasks
from trajectory.chat import load_tokenizer, render_prompt
from trajectory.types import Task


def synthesis_speed(config: RunConfig, tasks: list[Task]) -> tuple[float, dict[str, int]]:
    """Tokens/s that the engine generated while the stage ran, and the stage's counts."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        run_session(config) as gateway,
        engines(config, gateway) as pool,
    ):
        stage = SynthesisPass(
            config, Path(scratch), pool, pool, rollout_timeout_s=rollout_timeout_of(config), on_progress=lambda _: None
        )
        everyone = {i: {} for i in pool.ready_ids()}
        before = sum(s["generated_tokens"] for s in pool.map("stats", everyone, 60.0))
        started = time.monotonic()
        summary = stage.run(tasks, Interrupt())
        seconds = time.monotonic() - started
        tokens = sum(s["generated_tokens"] for s in pool.map("stats", everyone, 60.0)) - before
    counts = {
        name: summary[name] for name in ("num_candidates", "num_attempts", "num_kept", "num_repaired", "num_hard")
    }
    print(f"synthesize: {tokens / seconds:.0f} tokens/s ({tokens:.0f} tokens, {seconds:.1f} s); {counts}")
    return tokens / seconds, counts


async def plain_speed(config: RunConfig, tasks: list[Task]) -> float:
    """Tokens/s of plain vLLM on the same prompts, N of each, at the same concurrency."""
    tokenizer = load_tokenizer(config.model)
    engine = VLLMEngine(config.engine)
    await engine.start()
    places = asyncio.Semaphore(config.rollout.max_concurrent_episodes)
    sampling = Sampling(max_tokens=config.episode.max_response_tokens)

    async def one(name: str, prompt_ids: list[int]) -> int:
        async with places:
            return len((await engine.generate(prompt_ids, sampling, name)).token_ids)

    try:
        await asyncio.gather(*(one(f"warm-up-{i}", [1, 2, 3]) for i in range(64)))
        prompts = [render_prompt(tokenizer, task.question, config.episode.system_prompt) for task in tasks]
        started = time.monotonic()
        tokens = sum(
            await asyncio.gather(
                *(one(f"{i}/{k}", p) for i, p in enumerate(prompts) for k in range(config.synthesis.num_candidates))
            )
        )
        seconds = time.monotonic() - started
    finally:
        await engine.shutdown()
    print(f"plain vLLM: {tokens / seconds:.0f} tokens/s ({tokens} tokens, {seconds:.1f} s)")
    return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--config", default="examples/tiny/run.toml")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load(args.config, args.overrides)
    config = with_changes(config, {"rollout.group_size": config.synthesis.num_candidates})
    tasks = load_tasks(config.data)[: args.questions]
    ours, _ = synthesis_speed(config, tasks)
    plain = asyncio.run(plain_speed(config, tasks))
    print(f"ratio {ours / plain:.2f}")


if __name__ == "__main__":
    main()
