"""From samples to micro-batches: packed by token budget, balanced over ranks, laid out as tensors.

Every rank packs the same samples by the same deterministic rule and takes its own share: nothing has to be scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajectory.types import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # compared by identity: fields are arrays
class Sample:
    """One sequence to train on: L tokens, of which the first `prompt_len` (at least one) are the prompt.

    R = L − prompt_len response tokens; `mask` is True on those that carry loss. For supervised training `advantage` and
    `behaviour_logprobs` are left at their defaults.
    """

    ids: NDArray[np.int32]  # (L,)
    prompt_len: int
    mask: NDArray[np.bool_]  # (R,)
    behaviour_logprobs: NDArray[np.float32] | None = None  # (R,)
    advantage: float = 0.0

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory, advantage: float) -> Self:
        return cls(
            ids=np.concatenate([trajectory.prompt_ids, trajectory.response_ids]),
            prompt_len=len(trajectory.prompt_ids),
            mask=trajectory.loss_mask,
            behaviour_logprobs=trajectory.logprobs,
            advantage=advantage,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.mask.sum())


MicroBatch = tuple[Sample, ...]


def minibatches(samples: Sequence[Sample], num_minibatches: int) -> list[Sequence[Sample]]:
    """Split for several optimizer steps a batch; interleaved, so that siblings, which stand together, spread evenly."""
    if num_minibatches > len(samples):
        raise ValueError(f"num_minibatches={num_minibatches} exceeds the {len(samples)} samples of this batch")
    return [samples[i::num_minibatches] for i in range(num_minibatches)]


def pack(
    samples: Sequence[Sample], token_budget: int, world_size: int = 1, *, padded: bool = True
) -> list[list[MicroBatch]]:
    """Micro-batches for each rank.

    Args:
        samples: the batch, in an order all ranks agree on.
        token_budget: most tokens in a micro-batch. With `padded`, B × longest counts (right-padded rectangles, so
            neighbours in length go together); otherwise the sum of lengths (first-fit decreasing).
        world_size: number of ranks.

    Returns:
        One list a rank, all of the same length ≥ 1 (ZeRO's collectives need that), each sample exactly once. Where a
        rank would run out of samples it gets a copy of the shortest one that carries no loss. Ranks' token counts
        differ by at most the longest sample's, fillers aside.

    Raises:
        ValueError: no samples, or a sample is longer than the budget.
    """
    if not samples:
        raise ValueError("no samples to pack")
    longest = max(map(len, samples))
    if longest > token_budget:
        raise ValueError(f"a sample of {longest} tokens exceeds micro_batch_tokens={token_budget}; raise that setting")
    by_length = sorted(samples, key=len, reverse=True)
    shares: list[list[Sample]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for sample in by_length:  # longest first to the least loaded rank
        rank = loads.index(min(loads))
        shares[rank].append(sample)
        loads[rank] += len(sample)
    fit = _fit_padded if padded else _fit_packed
    ranks = [fit(share, token_budget) for share in shares]
    count = max(map(len, ranks))
    filler = replace(by_length[-1], mask=np.zeros_like(by_length[-1].mask), advantage=0.0)
    for bins in ranks:
        while len(bins) < count:
            widest = max(bins, key=len, default=[])
            if len(widest) > 1:
                bins.remove(widest)
                bins += [widest[::2], widest[1::2]]
            else:
                bins.append([filler])
    return [[tuple(b) for b in bins] for bins in ranks]


def _fit_padded(by_length: Sequence[Sample], token_budget: int) -> list[list[Sample]]:
    bins: list[list[Sample]] = []
    for sample in by_length:
        if bins and (len(bins[-1]) + 1) * len(bins[-1][0]) <= token_budget:
            bins[-1].append(sample)
        else:
            bins.append([sample])
    return bins


def _fit_packed(by_length: Sequence[Sample], token_budget: int) -> list[list[Sample]]:
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in by_length:
        i = next((i for i, free in enumerate(room) if free >= len(sample)), len(bins))
        if i == len(bins):
            bins.append([])
            room.append(token_budget)
        bins[i].append(sample)
        room[i] -= len(sample)
    return bins


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """A micro-batch as tensors. B sequences, T = longest response, N = True entries of `mask`.

    Padded: `input_ids` is (B, L), padded on the right; under causal attention no real token sees the padding, so no
    attention mask is needed. Packed: (1, ΣL), with `position_ids` that restart at 0 at each sequence and the `borders`
    between sequences for variable-length attention.
    """

    input_ids: Tensor  # (B, L) or (1, ΣL)
    position_ids: Tensor  # (1, L) or (1, ΣL)
    source: Tensor  # (N,) into the flattened hidden states: the position that predicts each loss token
    targets: Tensor  # (N,) the loss tokens, in `mask`'s row-major order
    mask: Tensor  # (B, T)
    behaviour_logprobs: Tensor  # (B, T)
    advantages: Tensor  # (B,)
    borders: Tensor | None  # packed: (B + 1,) int32, 0 and the running sum of lengths; padded: None
    longest: int  # most tokens in a sequence


def collate(samples: MicroBatch, *, padded: bool, device: torch.device | str = "cpu") -> Batch:
    """Lay out a micro-batch; only positions that carry loss are listed in `source`, so only those need logits."""
    lengths = [len(s) for s in samples]
    num_cols = max(len(s.mask) for s in samples)
    mask = np.zeros((len(samples), num_cols), dtype=np.bool_)
    behaviour = np.zeros((len(samples), num_cols), dtype=np.float32)
    source, targets = [], []
    if padded:
        width = max(lengths)
        ids = np.zeros((len(samples), width), dtype=np.int64)
        positions, starts = np.arange(width), np.arange(len(samples)) * width
    else:
        ids = np.concatenate([s.ids for s in samples])[None].astype(np.int64)
        positions, starts = np.concatenate([np.arange(n) for n in lengths]), np.cumsum([0, *lengths[:-1]])
    for row, (sample, start) in enumerate(zip(samples, starts, strict=True)):
        assert 1 <= sample.prompt_len <= len(sample) == sample.prompt_len + len(sample.mask)
        if padded:
            ids[row, : len(sample)] = sample.ids
        (where,) = np.nonzero(sample.mask)
        mask[row, where] = True
        if sample.behaviour_logprobs is not None:
            behaviour[row, where] = sample.behaviour_logprobs[where]
        source.append(start + sample.prompt_len + where - 1)
        targets.append(sample.ids[sample.prompt_len + where])

    def tensor(array: NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    return Batch(
        input_ids=tensor(ids, torch.int64),
        position_ids=tensor(positions[None], torch.int64),
        source=tensor(np.concatenate(source), torch.int64),
        targets=tensor(np.concatenate(targets), torch.int64),
        mask=tensor(mask, torch.bool),
        behaviour_logprobs=tensor(behaviour, torch.float32),
        advantages=tensor(np.array([s.advantage for s in samples]), torch.float32),
        borders=None if padded else tensor(np.cumsum([0, *lengths]), torch.int32),
        longest=max(lengths),
    )
