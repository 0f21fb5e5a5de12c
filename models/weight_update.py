"""What a learner publishes and an engine takes: one set of weights with its version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """A published set of weights.

    With `backend="host"`, `payload` is a mapping name → (numpy array, dtype name); bf16 travels as its uint16 bits. It
    goes between actors as a Ray object, so engines on one node share one copy. With `backend="nccl"` the tensors go over
    the process group in the order of `names`, and `payload` is None.
    """

    policy_version: int
    backend: Literal["host", "nccl"]
    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # torch names without the prefix: "float32", "bfloat16"
    shapes: tuple[tuple[int, ...], ...]
    payload: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobProbe:
    """The gate's yardstick: a fixed token sequence and what the learner thinks of it under `policy_version`.

    `logprobs[i]` is log p(token_ids[i + 1] | token_ids[: i + 1]); length len(token_ids) − 1.
    """

    policy_version: int
    token_ids: tuple[int, ...]
    logprobs: NDArray[np.float32]
