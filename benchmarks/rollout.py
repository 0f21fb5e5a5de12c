"""Measures the cost of tools: generated tokens/s of whole episodes over those of plain vLLM on the same prompts.

    python -m benchmarks.rollout [--rounds 5] [--groups 64] [--in-flight 16]

The tiny model, one engine, the real sandbox. Both arms keep the same number of groups of 8 in flight on the same prompts, in
turns, so that a busy machine slows both. Plain vLLM samples from the prompt to its end of sequence with logprobs and
without stop strings, tools or turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count

from actors import episode
from actors.config import EngineConfig, EpisodeConfig
from actors.engine.protocol import Sampling
from actors.engine.vllm import VLLMEngine
from actors.sampler import Sampler
from tasks.word_problems.problems import generate
from tool_sandbox.client import AsyncSandboxClient
from tool_sandbox.local import local_sandbox
from trajectory.chat import load_tokenizer, render_prompt
from trajectory.types import Task, ToolCall, ToolResult

MODEL = "examples/tiny/base"
GROUP_SIZE = 8
ENGINE = EngineConfig(model=MODEL, max_model_len=512, cpu_kv_cache_gib=1)
EPISODE = EpisodeConfig(system_prompt="", max_prompt_tokens=160, max_response_tokens=160, max_result_chars=200)


async def keep_in_flight(
    tasks: Sequence[Task], in_flight: int, sample: Callable[[Task, int], Awaitable[int]]
) -> tuple[int, float]:
    """Tokens and seconds of `sample(task, number)` over all `tasks`, `in_flight` at a time."""
    places = asyncio.Semaphore(in_flight)

    async def one(number: int, task: Task) -> int:
        async with places:
            return await sample(task, number)

    started = time.monotonic()
    tokens = sum(await asyncio.gather(*(one(i, task) for i, task in enumerate(tasks))))
    return tokens, time.monotonic() - started


async def compare(call_tool: episode.CallTool, *, rounds: int, num_groups: int, in_flight: int) -> None:
    """Prints both arms of every round, and the median ratio."""
    tokenizer = load_tokenizer(MODEL)
    engine = VLLMEngine(ENGINE)
    await engine.start()
    sampler = Sampler(engine, tokenizer, call_tool, EPISODE, max_concurrent_episodes=in_flight * GROUP_SIZE)
    serial = count()

    async def episodes(task: Task, number: int) -> int:
        group = await sampler.sample_group(task, lease_id=f"{next(serial)}", group_size=GROUP_SIZE, seed=number)
        failed = [t.error for t in group.trajectories if t.failed]
        assert not failed, failed[0]
        results = [turn.tool_result for t in group.trajectories for turn in t.turns if turn.tool_result]
        unavailable = [result.message for result in results if result.status == "unavailable"]
        assert not unavailable, unavailable[0]
        results_seen.extend(results)
        return sum(t.num_generated_tokens for t in group.trajectories)

    async def plain(task: Task, number: int) -> int:
        prompt_ids = render_prompt(tokenizer, task.question, EPISODE.system_prompt)
        sampling = Sampling(max_tokens=EPISODE.max_response_tokens)
        requests = (engine.generate(prompt_ids, sampling, f"plain-{next(serial)}") for _ in range(GROUP_SIZE))
        return sum(len(generation.token_ids) for generation in await asyncio.gather(*requests))

    ratios = []
    try:
        for i in range(rounds + 1):
            tasks = generate("train", num_groups, seed=i)  # new ones, so that no round finds its prompts in the cache
            results_seen: list[ToolResult] = []
            raw_tokens, raw_s = await keep_in_flight(tasks, in_flight, plain)
            tokens, seconds = await keep_in_flight(tasks, in_flight, episodes)
            if i == 0:
                continue  # warm-up
            ratios.append((tokens / seconds) / (raw_tokens / raw_s))
            print(
                f"round {i}: episodes {tokens / seconds:6.0f} tokens/s ({tokens} tokens, {len(results_seen)} tool calls, "
                f"{seconds:.1f} s), plain vLLM {raw_tokens / raw_s:6.0f} tokens/s ({raw_tokens} tokens), "
                f"ratio {ratios[-1]:.2f}"
            )
    finally:
        await engine.shutdown()
    cached = sampler.num_cached_tokens / sampler.num_prompt_tokens
    print(f"median ratio {statistics.median(ratios):.2f} over {rounds} rounds; {cached:.0%} of prompt tokens cached")


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=16)
    args = parser.parse_args()
    with local_sandbox(num_containers=2) as gateway:
        async with AsyncSandboxClient(gateway.address) as client:

            async def call_tool(call: ToolCall, timeout_s: float) -> ToolResult:
                return await client.call(call.tool, call.content, timeout_s=timeout_s)

            await compare(call_tool, rounds=args.rounds, num_groups=args.groups, in_flight=args.in_flight)


if __name__ == "__main__":
    asyncio.run(main())
