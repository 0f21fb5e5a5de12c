"""One set of weights with its version, which a learner publishes and engines load."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """A published set of weights.

    With `backend="host"`, `payload` is a mapping name → (numpy array, dtype name), where bf16 is stored as its uint16 bits.
    Actors pass it as a Ray object, so engines on one node share one copy. With `backend="nccl"` the tensors go through the
    process group in the order of `names`, and `payload` is None. `backend="adapter"` is as `host`, and the tensors are an
    adapter's, with the names of peft's files: A (rank, in) and B (out, rank), the latter multiplied by alpha / rank.
    """

    policy_version: int
    backend: Literal["host", "nccl", "adapter"]
    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # torch names without the prefix: "float32", "bfloat16"
    shapes: tuple[tuple[int, ...], ...]
    payload: Any = None
    publication: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The same in all copies of this update, and in no other one: after a return to a checkpoint, versions come again with
    other weights, and several runs may share a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobProbe:
    """The gate's reference: a fixed token sequence with the learner's log-probabilities under `policy_version`.

    `logprobs[i]` is log p(token_ids[i + 1] | token_ids[: i + 1]); length len(token_ids) − 1.
    """

    policy_version: int
    token_ids: tuple[int, ...]
    logprobs: NDArray[np.float32]
