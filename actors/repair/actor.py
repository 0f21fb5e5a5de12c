"""The repair actor: it takes bad trajectories and returns repairs, or the reasons why there are none. It uses an engine
of its own or an HTTP endpoint.

The policy's own engine repairs in `RolloutActor.repair`. `attempts.py` says what a repair is.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from actors.config import RepairSettings
from actors.engine.follow import EngineFollower
from actors.engine.protocol import Engine
from actors.engine.registry import make_engine
from actors.repair.attempts import on_engine, repair_all
from actors.repair.endpoint import Endpoint, on_endpoint
from actors.repair.types import AttemptFn, RepairRequest, RepairResult
from actors.sampler import Sampler
from actors.tools import Tools
from trajectory.chat import encode, load_tokenizer
from trajectory.types import ToolCall, ToolResult


class RepairActor:
    """Repairs trajectories. An asynchronous Ray actor; `apply` and `ping` are for RLlib's `FaultTolerantActorManager`.

    `start` must have returned before any other call. When its engine dies, so does the actor: have Ray restart it.
    """

    def __init__(self, settings: RepairSettings, index: int = 0) -> None:
        self._settings = settings
        self._index = index
        self._engine: Engine | None = None
        self._follower: EngineFollower | None = None
        self._endpoint: Endpoint | None = None
        self._sampler: Sampler | None = None
        self._tools: Tools | None = None
        self._attempt: AttemptFn | None = None
        self._encode: Callable[[str], list[int]] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"RepairActor({self._index})"

    async def start(self) -> None:
        """Start the engine, within `engine.start_timeout_s`, or prepare for the endpoint, which isn't contacted yet.

        Every caller waits for the same start. Raises ValueError for a checkpoint that can't be served or a key that doesn't
        exist, and `EngineError`.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def repair(self, requests: Sequence[RepairRequest], seed: int) -> list[RepairResult]:
        """One result for each request, in their order, each within `repair.deadline_s`; see `attempts.repair`.

        Raises EngineDead, since results of a dead engine say nothing about the requests."""
        if self._attempt is None:
            raise RuntimeError(f"{self!r} was asked before start() returned")
        work = repair_all(
            requests,
            seed,
            attempt=self._attempt,
            config=self._settings.repair,
            quality_config=self._settings.quality,
            reward_config=self._settings.reward,
            encode=self._encode,
        )
        results = await (self._follower.result(work) if self._follower else work)
        for result in results:
            self._counts["requests"] += 1
            self._counts["accepted"] += result.accepted is not None
            self._counts["attempts"] += len(result.attempts)
            self._counts.update(f"failed/{attempt.reason}" for attempt in result.attempts if attempt.reason)
        return results

    async def stats(self) -> dict[str, float]:
        """Counters since the start (`failed/<reason>` among them), and the number of running attempts."""
        counts = {name: float(self._counts[name]) for name in ("requests", "accepted", "attempts", *self._counts)}
        if self._engine is not None and self._sampler is not None:
            return counts | {
                "requests_in_flight": self._engine.num_requests,
                "generated_tokens": self._sampler.num_generated_tokens,
            }
        if self._endpoint is not None:
            return counts | {
                "requests_in_flight": self._endpoint.num_requests_in_flight,
                "generated_tokens": self._endpoint.num_generated_tokens,
            }
        return counts

    async def shutdown(self) -> None:
        """Stop the engine or close the connection to the endpoint, and close the one to the sandbox."""
        if self._engine is not None and self._follower is not None:
            self._follower.stop()
            await self._engine.shutdown()
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._tools is not None:
            await self._tools.close()

    def ping(self) -> str:
        return "pong"

    async def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `func(self, …)`."""
        result = func(self, *args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        settings, config = self._settings, self._settings.repair
        policy_tokenizer = await asyncio.to_thread(load_tokenizer, settings.model)
        self._tools = Tools(settings)
        if config.engine is None or config.engine.model != settings.model:
            self._encode = lambda text: encode(policy_tokenizer, text)
        if config.repairer == "endpoint":
            assert config.endpoint is not None
            self._endpoint = Endpoint(config.endpoint)
            self._attempt = on_endpoint(
                self._endpoint,
                policy_tokenizer,
                self._call_tool,
                settings.episode,
                max_concurrent_attempts=config.max_concurrent_attempts,
            )
            return
        assert config.engine is not None
        self._engine = make_engine(config.engine, seed=self._index)
        self._follower = EngineFollower(self._engine, repr(self))
        await self._engine.start()
        tokenizer = await asyncio.to_thread(load_tokenizer, config.engine.model)
        self._sampler = Sampler(
            self._engine,
            tokenizer,
            self._call_tool,
            settings.episode,
            max_concurrent_episodes=config.max_concurrent_attempts,
        )
        limit = config.prompt_limit(config.engine, settings.episode)
        self._attempt = on_engine(self._sampler, tokenizer, settings.episode, limit)

    async def _call_tool(self, call: ToolCall, timeout_s: float) -> ToolResult:
        assert self._tools is not None, "connected by start()"
        return await self._tools.call(call, timeout_s)
