"""Makes micro-batches from samples: packed by token budget, balanced over ranks, as tensors.

Every rank packs the same samples by the same deterministic rule and takes its own share, so nothing has to be scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.forward import Layout, lay_out, score_positions
from models.packing import assign
from models.sequence_parallel import WHOLE, Part, Share
from trajectory.types import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # compared by identity: fields are arrays
class Sample:
    """One sequence to train on: L tokens, of which the first `prompt_len` (at least one) are the prompt.

    There are R = L − prompt_len response tokens; `mask` is True on those that carry loss. For supervised training
    `advantage` and `behaviour_logprobs` keep their defaults.
    """

    ids: NDArray[np.int32]  # (L,)
    prompt_len: int
    mask: NDArray[np.bool_]  # (R,)
    behaviour_logprobs: NDArray[np.float32] | None = None  # (R,)
    advantage: float = 0.0
    on_policy: bool = False  # whether the policy before this batch's update sampled all of it

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory, advantage: float, policy_version: int) -> Self:
        """`policy_version`: that of the learner."""
        return cls(
            ids=np.concatenate([trajectory.prompt_ids, trajectory.response_ids]),
            prompt_len=len(trajectory.prompt_ids),
            mask=trajectory.loss_mask,
            behaviour_logprobs=trajectory.logprobs,
            advantage=advantage,
            # A token after a change of weights would not do: it was sampled with keys and values of the older ones.
            on_policy={segment.policy_version for segment in trajectory.segments} == {policy_version},
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """Two token sequences, prompt included, of which the first is preferred by at least `margin` (in logits)."""

    chosen: NDArray[np.int32]  # (L₁,)
    rejected: NDArray[np.int32]  # (L₂,)
    margin: float = 0.0

    def __len__(self) -> int:
        """Tokens of a rectangle that contains both sides. It must fit into `micro_batch_tokens`."""
        return 2 * max(len(self.chosen), len(self.rejected))


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Raise ValueError if there are no pairs, or for the first pair with equal or empty sides or a margin that is no
    number."""
    if not pairs:
        raise ValueError("no pairs to train on")
    for i, pair in enumerate(pairs):
        if np.array_equal(pair.chosen, pair.rejected):
            raise ValueError(f"pair {i}: both sides are the same {len(pair.chosen)} tokens; there is nothing to prefer")
        if not len(pair.chosen) or not len(pair.rejected):
            raise ValueError(f"pair {i}: the {'rejected' if len(pair.chosen) else 'chosen'} side is empty")
        if not np.isfinite(pair.margin):
            raise ValueError(f"pair {i}: margin={pair.margin}")


MicroBatch = tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The samples of one optimizer step, and the divisors of its loss, which is a mean over the whole step, zeros
    included."""

    samples: Sequence[Sample]  # at least one, each with a gradient
    num_tokens: float  # their loss tokens, plus their share of those of samples without a gradient
    num_sequences: float  # the same for sequences


def has_gradient(sample: Sample, *, with_kl: bool) -> bool:
    """Whether a policy loss depends on this sample. Without advantage, only a KL penalty gives it a gradient."""
    return sample.num_loss_tokens > 0 and (with_kl or sample.advantage != 0.0)


def minibatches(samples: Sequence[Sample], num_minibatches: int, *, with_kl: bool) -> list[MiniBatch]:
    """Split a batch for several optimizer steps. The split is interleaved, so that the samples of a group, which are
    neighbours, are spread evenly.

    Samples without a gradient aren't passed through the model. But the loss is a mean over the whole batch, to which they
    contribute zeros, so each minibatch's denominators are enlarged by its share of them. If fewer samples have a gradient
    than minibatches are requested, there are as many minibatches as such samples.

    Raises:
        ValueError: no sample has a gradient.
    """
    moving = [sample for sample in samples if has_gradient(sample, with_kl=with_kl)]
    if not moving:
        raise ValueError(f"none of the {len(samples)} samples has a gradient: all advantages are 0, and there is no KL")
    tokens = sum(s.num_loss_tokens for s in samples) / sum(s.num_loss_tokens for s in moving)
    sequences = len(samples) / len(moving)
    count = min(num_minibatches, len(moving))
    splits = [moving[i::count] for i in range(count)]
    return [
        MiniBatch(
            samples=split,
            num_tokens=tokens * sum(s.num_loss_tokens for s in split),
            num_sequences=sequences * len(split),
        )
        for split in splits
    ]


def pack(
    samples: Sequence[Sample], token_budget: int, world_size: int = 1, *, padded: bool = True
) -> list[list[MicroBatch]]:
    """Micro-batches for each rank, by `assign`. A rank without samples trains on a filler that carries no loss."""
    shares = assign([len(s) for s in samples], token_budget, world_size, padded=padded)
    shortest = min(samples, key=len)
    filler = replace(shortest, mask=np.zeros_like(shortest.mask), advantage=0.0)
    return [[tuple(samples[i] for i in bin_) or (filler,) for bin_ in bins] for bins in shares]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """A micro-batch as tensors. B sequences, T = longest response, N = True entries of `mask`, of which n are in this rank's
    part: all, unless ranks share micro-batches."""

    layout: Layout
    source: Tensor  # (n,) positions in this part's flattened hidden states, each of which predicts one loss token
    targets: Tensor  # (n,) the loss tokens, in `mask`'s row-major order
    share: Share  # which of the N these are
    mask: Tensor  # (B, T)
    behaviour_logprobs: Tensor  # (B, T)
    advantages: Tensor  # (B,)
    on_policy: Tensor  # (B,) bool


def collate(samples: MicroBatch, *, padded: bool, device: torch.device | str = "cpu", part: Part = WHOLE) -> Batch:
    """Arrange a micro-batch. `source` lists only positions that carry loss, so only those need logits. A loss token may be
    in another part than the position that predicts it."""
    num_cols = max(len(s.mask) for s in samples)
    mask = np.zeros((len(samples), num_cols), dtype=np.bool_)
    behaviour = np.zeros((len(samples), num_cols), dtype=np.float32)
    source, targets = [], []
    layout = lay_out([s.ids for s in samples], padded=padded, device=device, part=part)
    for row, (sample, start) in enumerate(zip(samples, layout.starts, strict=True)):
        assert 1 <= sample.prompt_len <= len(sample) == sample.prompt_len + len(sample.mask)
        (where,) = np.nonzero(sample.mask)
        mask[row, where] = True
        if sample.behaviour_logprobs is not None:
            behaviour[row, where] = sample.behaviour_logprobs[where]
        source.append(start + sample.prompt_len + where - 1)
        targets.append(sample.ids[sample.prompt_len + where])

    positions = np.concatenate(source)
    share = layout.share_of(positions)
    mine = slice(share.first, share.end)

    def tensor(array: NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    return Batch(
        layout=layout,
        source=tensor(positions[mine] - layout.first, torch.int64),
        targets=tensor(np.concatenate(targets)[mine], torch.int64),
        share=share,
        mask=tensor(mask, torch.bool),
        behaviour_logprobs=tensor(behaviour, torch.float32),
        advantages=tensor(np.array([s.advantage for s in samples]), torch.float32),
        on_policy=tensor(np.array([s.on_policy for s in samples]), torch.bool),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreBatch:
    """A micro-batch of whole sequences that each get one score. B sequences, or the 2·P sides of P pairs.

    A filler's scores belong to nothing. They are computed because ZeRO's collectives need all ranks, and then left out.
    """

    layout: Layout
    source: Tensor  # (B,), or those in this part: positions in its flattened hidden states at which scores are read
    share: Share  # which of the B these are
    items: tuple[int, ...]  # indices of the sequences or pairs; empty for a filler
    margins: Tensor | None = None  # (P,) for pairs, with all chosen sides first and then the rejected ones; else None


def collate_pairs(
    pairs: Sequence[Pair],
    token_budget: int,
    rank: int,
    world_size: int,
    *,
    pad_token_id: int,
    padded: bool,
    device: torch.device | str = "cpu",
    part: Part = WHOLE,
) -> list[ScoreBatch]:
    """This rank's micro-batches, as `assign` makes them. Both sides of a pair are in the same one."""
    sizes = [len(p) if padded else len(p.chosen) + len(p.rejected) for p in pairs]
    filler = sizes.index(min(sizes)) if sizes else 0
    made = []
    for items in assign(sizes, token_budget, world_size, padded=padded)[rank]:
        together = [pairs[i] for i in items or (filler,)]
        sides = [p.chosen for p in together] + [p.rejected for p in together]
        margins = torch.tensor([p.margin for p in together][: len(items)], dtype=torch.float32, device=device)
        layout = lay_out(sides, padded=padded, device=device, part=part)
        made.append(_score_batch(layout, sides, items, margins, pad_token_id=pad_token_id))
    return made


def collate_sequences(
    sequences: Sequence[NDArray[np.int32]],
    token_budget: int,
    rank: int,
    world_size: int,
    *,
    pad_token_id: int,
    padded: bool,
    device: torch.device | str = "cpu",
    part: Part = WHOLE,
) -> list[ScoreBatch]:
    """Like `collate_pairs`, for single sequences of token ids, (L,) each, at least one."""
    sizes = [len(ids) for ids in sequences]
    if 0 in sizes:
        raise ValueError(f"sequence {sizes.index(0)} is empty: it has no last token to read a score at")
    filler = sizes.index(min(sizes)) if sizes else 0
    made = []
    for items in assign(sizes, token_budget, world_size, padded=padded)[rank]:
        together = [sequences[i] for i in items or (filler,)]
        layout = lay_out(together, padded=padded, device=device, part=part)
        made.append(_score_batch(layout, together, items, None, pad_token_id=pad_token_id))
    return made


def _score_batch(
    layout: Layout,
    sequences: Sequence[NDArray[np.int32]],
    items: tuple[int, ...],
    margins: Tensor | None,
    *,
    pad_token_id: int,
) -> ScoreBatch:
    positions = score_positions(layout, sequences, pad_token_id)
    share = layout.share_of(positions.cpu().numpy())
    source = positions[share.first : share.end] - layout.first
    return ScoreBatch(layout=layout, source=source, share=share, items=items, margins=margins)
