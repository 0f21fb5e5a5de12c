"""The rollout actor: one engine and its episodes behind an RLlib `EnvRunner`.

RLlib creates, checks and restarts it; the controller requests groups from it. It is an asynchronous Ray actor: every method
below may run while others wait, so it can take new weights and answer checks in the middle of a rollout.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_runner import EnvRunner

from actors.config import RolloutSettings
from actors.engine.follow import EngineFollower
from actors.engine.protocol import GateAnswer, UpdateReport
from actors.engine.registry import make_engine
from actors.metrics import EngineMetrics
from actors.repair.attempts import on_engine, repair_all
from actors.repair.types import AttemptFn, RepairRequest, RepairResult
from actors.sampler import Sampler
from actors.tools import Tools
from models.weight_update import WeightUpdate
from trajectory.chat import load_tokenizer
from trajectory.types import Group, Task, ToolCall, ToolResult

REPORT_EVERY_S = 2.0
"""Time between two updates of the metrics, seconds. Ray sends them on every ten seconds."""


class RolloutActor(EnvRunner):
    """Samples groups of episodes. Reads one attribute of its config: `rollout_settings`, a `RolloutSettings`.

    `start` must have returned before any other call. When the engine dies, so does the actor, and RLlib restarts it, because
    only a new process is sure to be in a good state.
    """

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self._settings: RolloutSettings = config.rollout_settings
        self._engine = make_engine(self._settings.engine, seed=(config.seed or 0) + self.worker_index)
        self._follower = EngineFollower(self._engine, repr(self))
        self._tools: Tools | None = None
        self._sampler: Sampler | None = None
        self._attempt_repair: AttemptFn | None = None
        self._starting: asyncio.Task[None] | None = None
        self._metrics = EngineMetrics(str(self.worker_index))
        self._reporting: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"RolloutActor({self.worker_index})"

    # --- methods for the controller -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine, within `engine.start_timeout_s`. Every caller waits for the same start."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def rollout_group(self, lease_id: str, task: Task, seed: int) -> Group:
        """Sample `rollout.group_size` trajectories for `task`. Raises EngineDead."""
        return await self._follower.result(
            self._running().sample_group(
                task, lease_id=lease_id, group_size=self._settings.rollout.group_size, seed=seed
            )
        )

    async def evaluate(self, tasks: Sequence[Task], num_samples: int, temperature: float, seed: int) -> list[Group]:
        """One group of `num_samples` for each task, in the order of `tasks`. Temperature 0 is greedy. Raises EngineDead."""
        return await self._follower.result(
            self._running().evaluate(tasks, num_samples=num_samples, temperature=temperature, seed=seed)
        )

    async def repair(self, requests: Sequence[RepairRequest], seed: int) -> list[RepairResult]:
        """One result for each request, in their order, by this actor's engine; see `repair.attempts.repair`.

        Needs `rollout_settings.repair` with repairer = `policy`. Attempts take places of episodes. Raises EngineDead.
        """
        self._running()
        if self._attempt_repair is None:
            raise RuntimeError(
                f"{self!r} was asked to repair, but rollout_settings.repair doesn't say repairer = 'policy'"
            )
        settings = self._settings
        assert settings.repair is not None
        return await self._follower.result(
            repair_all(
                requests,
                seed,
                attempt=self._attempt_repair,
                config=settings.repair,
                quality_config=settings.quality,
                reward_config=settings.reward,
            )
        )

    async def update_weights(self, update: Sequence[ray.ObjectRef]) -> UpdateReport:
        """Load the `WeightUpdate` behind the single reference in `update`, while rollouts go on.

        The list keeps Ray from resolving the reference before the call, as a lost object would then fail without a name.
        """
        self._running()
        (reference,) = update
        limit = self._settings.engine.update_timeout_s
        begun = time.monotonic()
        try:
            weights: WeightUpdate = await asyncio.wait_for(reference, limit)
        except TimeoutError:
            raise TimeoutError(f"{self!r} waited {limit:g} s for the weights in the object store") from None
        fetched = time.monotonic()
        try:
            report = await self._engine.update_weights(weights)
            self._metrics.weights_taken(report, fetched - begun)
            return report
        finally:
            self._follower.look()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Join the learner's NCCL group; `init_info` is vLLM's `NCCLWeightTransferInitInfo`.

        Each actor has its own `rank_offset`: 1 (the learner is rank 0) plus the workers of the actors before it.
        """
        self._running()
        await self._engine.init_weight_transfer(init_info)

    async def answer_gate(self, token_ids: Sequence[int], names: Sequence[str]) -> GateAnswer:
        """The logprobs of a text under the current weights, and the checksums of the weights of these names."""
        self._running()
        try:
            logprobs = await self._engine.score(token_ids)
            begun = time.monotonic()
            held = await self._engine.held_sums(names)
            return GateAnswer(logprobs=logprobs, held=held, sums_s=time.monotonic() - begun)
        finally:
            self._follower.look()

    async def stats(self) -> dict[str, float]:
        """Counters since the start, and the numbers of running episodes and requests."""
        sampler = self._running()
        return {
            "policy_version": self._engine.policy_version,
            "episodes_in_flight": sampler.num_episodes_in_flight,
            "requests_in_flight": self._engine.num_requests,
            "episodes_finished": sampler.num_episodes_finished,
            "generated_tokens": sampler.num_generated_tokens,
            "prompt_tokens": sampler.num_prompt_tokens,
            "cached_prompt_tokens": sampler.num_cached_tokens,
        }

    async def shutdown(self) -> None:
        """Stop the engine and close the connections to the sandbox."""
        self._follower.stop()
        if self._reporting is not None:
            self._reporting.cancel()
        await self._engine.shutdown()
        if self._tools is not None:
            await self._tools.close()

    # --- methods for RLlib --------------------------------------------------------------------------------------------

    async def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `func(self, …)`. RLlib's own version hides an exception, sleeps a minute and ends the process (Ray 2.60)."""
        result = func(self, *args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    def assert_healthy(self) -> None:
        """Does nothing: an actor that exists is healthy, as engines start later, in `start`, all at the same time."""

    def get_spaces(self) -> dict[str, Any]:
        """Returns no spaces, as there is no gym environment."""
        return {}

    def sample(self, **kwargs: Any) -> Any:
        raise NotImplementedError("the controller leases tasks and calls rollout_group")

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns no state: weights are pushed, and tasks are leased."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Does nothing, see `get_state`."""

    async def stop(self) -> None:
        await self.shutdown()

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        settings = self._settings
        tokenizer = await asyncio.to_thread(load_tokenizer, settings.engine.model)
        self._tools = Tools(settings)
        await self._engine.start()
        self._sampler = Sampler(
            self._engine,
            tokenizer,
            self._call_tool,
            settings.episode,
            max_concurrent_episodes=settings.rollout.max_concurrent_episodes,
        )
        if settings.repair is not None and settings.repair.repairer == "policy":
            limit = settings.repair.prompt_limit(settings.engine, settings.episode)
            self._attempt_repair = on_engine(self._sampler, tokenizer, settings.episode, limit)
        self._reporting = asyncio.create_task(self._report())

    async def _report(self) -> None:
        while True:
            self._metrics.stats(await self.stats())
            await asyncio.sleep(REPORT_EVERY_S)

    async def _call_tool(self, call: ToolCall, timeout_s: float) -> ToolResult:
        assert self._tools is not None, "connected by start()"
        begun = time.monotonic()
        result = await self._tools.call(call, timeout_s)
        self._metrics.tool_call(call.tool, result, time.monotonic() - begun)
        return result

    def _running(self) -> Sampler:
        if self._sampler is None:
            raise RuntimeError(f"{self!r} was asked before start() returned")
        return self._sampler
