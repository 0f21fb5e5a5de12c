"""Samples groups of episodes on one engine. Many run at once, and none waits for the tool call of another."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence

import numpy as np

from actors import episode
from actors.config import EpisodeConfig
from actors.engine.protocol import Engine, Generation, Sampling
from trajectory.chat import Tokenizer, encode, prompt_opening, render_prompt
from trajectory.markup import stop_strings
from trajectory.types import Group, Task, Trajectory


class Sampler:
    """Runs episodes with an engine and a tool. It uses neither Ray nor vLLM directly."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        call_tool: episode.CallTool,
        config: EpisodeConfig,
        *,
        max_concurrent_episodes: int,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._opening = prompt_opening(tokenizer, config.system_prompt)
        self._call_tool = call_tool
        self._config = config
        self._places = asyncio.Semaphore(max_concurrent_episodes)
        self._request_ids = itertools.count()
        self.num_episodes_in_flight = 0
        self.num_episodes_finished = 0
        self.num_generated_tokens = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        """Those of `num_prompt_tokens` that were found in the prefix cache: prompts of the same group and earlier turns."""

    async def sample_group(
        self, task: Task, *, lease_id: str, group_size: int, seed: int, temperature: float | None = None
    ) -> Group:
        """Sample `group_size` trajectories for `task`, at `temperature` or the configured one. Failed episodes are
        included."""
        started = time.monotonic()
        prompt_ids = render_prompt(self._tokenizer, task.question, self._config.system_prompt)
        temperature = self._config.temperature if temperature is None else temperature
        trajectories = await asyncio.gather(
            *(
                self._episode(
                    task, prompt_ids, index, lease_id, np.random.SeedSequence([seed, index]), temperature, self._config
                )
                for index in range(group_size)
            )
        )
        metrics = {"sample_seconds": time.monotonic() - started}
        return Group(lease_id=lease_id, task=task, trajectories=tuple(trajectories), metrics=metrics)

    async def evaluate(self, tasks: Sequence[Task], *, num_samples: int, temperature: float, seed: int) -> list[Group]:
        """One group of `num_samples` for each task, in the order of `tasks`."""
        return await asyncio.gather(
            *(
                self.sample_group(
                    task, lease_id=f"eval/{task.id}", group_size=num_samples, seed=seed + i, temperature=temperature
                )
                for i, task in enumerate(tasks)
            )
        )

    async def attempt(
        self, task: Task, prompt_ids: Sequence[int], name: str, seed: int, temperature: float
    ) -> Trajectory:
        """One episode on a prompt of the caller, such as a repair's, whatever its length.

        `name` must differ from those of all running episodes. A failure is data, as in a group.
        """
        config = self._config.model_copy(update={"max_prompt_tokens": len(prompt_ids)})
        seeds = np.random.SeedSequence(seed)
        return await self._episode(task, list(prompt_ids), 0, name, seeds, temperature, config)

    async def _episode(
        self,
        task: Task,
        prompt_ids: list[int],
        index: int,
        lease_id: str,
        seeds: np.random.SeedSequence,
        temperature: float,
        config: EpisodeConfig,
    ) -> Trajectory:
        async def generate(token_ids: Sequence[int], max_tokens: int) -> Generation:
            (turn_seeds,) = seeds.spawn(1)  # each turn needs its own: with one seed, it would repeat the turn before
            sampling = Sampling(
                max_tokens=max_tokens,
                temperature=temperature,
                stop=stop_strings(),
                seed=int(turn_seeds.generate_state(1)[0]),
            )
            # The leading number makes the name unique: after the loop was set back, a lease of the same name may still run.
            request_id = f"{next(self._request_ids)}/{lease_id}/{index}/{turn_seeds.spawn_key[-1]}"
            generation = await self._engine.generate(token_ids, sampling, request_id)
            self.num_generated_tokens += len(generation.token_ids)
            self.num_prompt_tokens += len(token_ids)
            self.num_cached_tokens += generation.num_cached_tokens
            return generation

        async with self._places:  # the deadline of an episode starts when it has its place
            self.num_episodes_in_flight += 1
            try:
                return await episode.run(
                    task,
                    prompt_ids,
                    index,
                    generate=generate,
                    call_tool=self._call_tool,
                    encode=lambda text: encode(self._tokenizer, text),
                    config=config,
                    opening=self._opening,
                )
            finally:
                self.num_episodes_in_flight -= 1
                self.num_episodes_finished += 1
