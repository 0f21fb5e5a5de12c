"""What an episode, a scorer and a weight sync need of an inference engine. `vllm_engine.py` is the one we have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.weight_update import WeightUpdate
from trajectory.types import Segment


class EngineError(Exception):
    """An engine did not do what was asked of it."""


class EngineDead(EngineError):
    """The engine is gone or can't be trusted any more; everything in flight on it is lost. Start a new one."""


class EngineTimeout(EngineError):
    """The engine did not answer within a deadline; the message says what was waited for."""


class RequestFailed(EngineError):
    """The engine refused or failed this one request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request samples. Temperature only: top-p and top-k would renormalise the logprobs."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one request sampled, n tokens. A stop string may end inside the last token: `text` is cut there, ids aren't."""

    token_ids: list[int]  # (n,) as sampled, the end-of-sequence token included
    logprobs: list[float]  # (n,) natural log under the distribution that was sampled from, temperature included
    text: str  # up to and including the stop string; special tokens left out
    finish_reason: Literal["stop_string", "eos", "length"]
    segments: tuple[Segment, ...]  # covers [0, n): which policy version sampled what
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What a weight update took, in seconds."""

    policy_version: int
    write_s: float  # payload to shared memory, while the engine still samples
    paused_s: float  # no request advanced
    num_kept: int  # requests in flight that went on with the new weights


class Engine(Protocol):
    """What rollouts, scoring and weight sync need. Every method raises `EngineError`."""

    @property
    def policy_version(self) -> int: ...

    @property
    def cause_of_death(self) -> str: ...  # empty while it lives

    async def start(self) -> None: ...

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation: ...

    async def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]: ...

    async def update_weights(self, update: WeightUpdate) -> UpdateReport: ...

    async def shutdown(self) -> None: ...
