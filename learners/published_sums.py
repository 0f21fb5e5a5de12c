"""The checksums of what a learner publishes, and how much of it changed since the last time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from learners.published import Published
from models.checksums import Checksums, WeightsDtype, checksum

SAMPLED_ENTRIES = 1 << 20
"""Number of entries that are kept to be compared with the next publication's. A smaller model is compared as a whole."""


class PublishedSums:
    """`begin`, then `add` for each tensor as it is published, then `finish`. All is rounded to `dtype`, the engine's.

    A share of changed entries is found on evenly spaced entries of each tensor, as the weights of the last publication are
    gone. In bfloat16 a small learning rate changes few entries, as the others' changes are below a unit in the last place.
    """

    def __init__(self, dtype: WeightsDtype) -> None:
        self._name: WeightsDtype = dtype
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._stride = 1
        self._sums: dict[str, Tensor] = {}
        self._sample: dict[str, Tensor] = {}
        self._previous: dict[str, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The engine's dtype."""
        return self._dtype

    def begin(self, tensors: Sequence[Published]) -> None:
        """Start on a publication of these tensors."""
        self._previous, self._sample, self._sums = self._sample, {}, {}
        # Odd, so that it isn't a multiple of a matrix's width and meets all of its columns
        self._stride = max(1, sum(math.prod(tensor.shape) for tensor in tensors) // SAMPLED_ENTRIES) | 1

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor, whole. Nothing waits for its device."""
        self._sums[name] = checksum(tensor, self._dtype)
        self._sample[name] = tensor.detach().reshape(-1)[:: self._stride].to(self._dtype, copy=True)

    def finish(self, policy_version: int) -> Checksums:
        """The checksums of this publication."""
        totals = torch.stack(list(self._sums.values())).tolist()
        changed = None
        if self._previous:
            counts = torch.stack([(self._sample[n] != before).sum() for n, before in self._previous.items()])
            changed = int(counts.sum()) / sum(len(sample) for sample in self._sample.values())
        return Checksums(
            policy_version=policy_version,
            dtype=self._name,
            sums=dict(zip(self._sums, totals, strict=True)),
            changed_share=changed,
        )
