"""The interface of an inference engine for episodes, scoring and weight sync. `vllm.py` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.weight_update import WeightUpdate
from trajectory.types import EpisodeError, Segment


class EngineError(Exception):
    """An engine did not do what was requested."""

    kind: ClassVar[EpisodeError] = "engine_failed"
    """What it makes of an episode that meets it."""


class EngineDead(EngineError):
    """The engine is gone or can't be trusted any more. All that ran on it is lost. Start a new one."""

    kind = "engine_dead"


class EngineTimeout(EngineError):
    """The engine did not answer within a deadline. The message says which answer was missing."""

    kind = "engine_timeout"


class RequestFailed(EngineError):
    """The engine refused this one request, or it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling parameters of one request. Temperature only, as top-p and top-k would renormalise the logprobs."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The n tokens that one request sampled. A stop string may end inside the last token: `text` is cut there, ids
    aren't."""

    token_ids: list[int]  # (n,) as sampled, including the end-of-sequence token
    logprobs: list[float]  # (n,) natural log under the distribution that was sampled from, temperature included
    text: str  # up to and including the stop string, without special tokens
    finish_reason: Literal["stop_string", "eos", "length"]
    segments: tuple[Segment, ...]  # cover [0, n): which policy version sampled which tokens
    num_cached_tokens: int = 0  # prompt tokens that were found in the prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """The duration of each part of a weight update, seconds."""

    policy_version: int
    write_s: float  # payload to shared memory, while the engine still samples
    paused_s: float  # while no request advanced
    num_kept: int  # running requests that continued with the new weights


class Engine(Protocol):
    """The methods that rollouts, scoring and weight sync use. Every method raises `EngineError`."""

    @property
    def policy_version(self) -> int: ...

    @property
    def cause_of_death(self) -> str: ...  # empty while it lives

    async def start(self) -> None: ...

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation: ...

    async def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]: ...

    async def update_weights(self, update: WeightUpdate) -> UpdateReport: ...

    async def shutdown(self) -> None: ...
