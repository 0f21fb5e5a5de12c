"""The interface of an inference engine: all that actors use of one. `registry` makes an engine, and `vllm` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.weight_update import WeightUpdate
from trajectory.types import EpisodeError, Segment

if TYPE_CHECKING:  # torch takes seconds, and configurations are checked without it
    from models.checksums import HeldSums


class EngineError(Exception):
    """An engine did not do what was requested."""

    kind: ClassVar[EpisodeError] = "engine_failed"
    """The kind of error with which an episode ends that meets this error."""


class EngineDead(EngineError):
    """The engine is gone or can't be trusted any more. All that ran on it is lost. Start a new one."""

    kind = "engine_dead"


class EngineTimeout(EngineError):
    """The engine did not answer within a deadline. The message says which answer was missing."""

    kind = "engine_timeout"


class NoRoom(EngineError):
    """The engine's node has no space for new weights. The message says how much there is and how much they need."""


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
    segments: tuple[
        Segment, ...
    ]  # cover [0, n): which policy version sampled which tokens; see `Segment` for empty ones
    num_cached_tokens: int = 0  # prompt tokens that were found in the prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """The duration of each part of a weight update, seconds."""

    policy_version: int
    write_s: float  # payload to shared memory, while the engine still samples
    paused_s: float  # while no request advanced
    num_kept: int  # running requests that continued with the new weights


@dataclass(frozen=True, slots=True, kw_only=True)
class GateAnswer:
    """What an actor tells of its engine after a weight update, for the gate."""

    logprobs: NDArray[np.float32]  # (n − 1,) of the probe's n tokens
    held: HeldSums
    sums_s: float  # seconds that the checksums took


class Engine(Protocol):
    """What actors use of an engine. It is made and used inside one event loop. Every method may raise `EngineError`."""

    @property
    def policy_version(self) -> int:
        """Version of the weights with which new requests are sampled; 0 until the first update."""
        ...

    @property
    def cause_of_death(self) -> str:
        """The reason why the engine has ended, after which its actor ends, too; empty while it works."""
        ...

    @property
    def num_requests(self) -> int:
        """Number of requests in flight."""
        ...

    async def start(self) -> None:
        """Load the model; returns when requests can come. Also raises ValueError for a checkpoint that can't be served."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Continue `prompt_ids`. Many calls run at the same time. Cancelling one frees its request."""
        ...

    async def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """log p(token_ids[i + 1] | token_ids[: i + 1]) under the current weights, (len − 1,)."""
        ...

    async def held_sums(self, names: Sequence[str]) -> HeldSums:
        """The checksums (`models/checksums.py`) of the published tensors `names` as the engine holds them now. An engine
        that can't compute one gives the reason instead: for all, `HeldSums.none(names, reason)`."""
        ...

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Join the learner's NCCL group; `init_info` as vLLM's `NCCLWeightTransferInitInfo`."""

    async def update_weights(self, update: WeightUpdate) -> UpdateReport:
        """Load new weights. Requests in flight continue with the new version. Also raises ValueError, and changes nothing,
        if `update` belongs to another model."""
        ...

    async def shutdown(self) -> None:
        """End the engine. Requests in flight fail, and later ones, too."""
