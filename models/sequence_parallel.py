"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): the ranks of a group each hold a part of one packed row.

All layers except attention treat each token by itself, so a rank runs them on its own tokens. Around attention, an
all-to-all exchanges a part of the tokens with all heads for all tokens with a part of the heads, and another one exchanges
the result back. Between the two, attention over packed sequences is the same as without sequence parallelism.

This is our own code because DeepSpeed's `UlyssesSPAttentionHF` (0.19) knows no attention with given borders: it gathers the
positions in every layer to find the borders again, and it keeps its state in a function that is registered for the whole
process. The differentiable collectives of `torch.distributed.nn.functional` are deprecated (2.13), and their successors are
private.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which of `count` equal parts of a packed row a rank holds. `group`: the ranks that hold all parts, in their order;
    None if there is one part."""

    index: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None


WHOLE = Part()


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Of `total` positions in a whole row, in ascending order, those from `first` up to before `end` are in a part."""

    first: int
    end: int
    total: int


def by_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(tokens of this part, all heads, head_dim) → (all tokens, heads of this rank, head_dim). Collective, differentiable.

    Each rank gets the same number of heads. If there are fewer heads than ranks (of keys and values), several ranks get the
    same one, which is the one that their query heads use."""
    count = group.size()
    if x.shape[1] < count:
        x = x.repeat_interleave(count // x.shape[1], dim=1)
    parts: Tensor = _AllToAll.apply(x.unflatten(1, (count, -1)).movedim(1, 0), group)  # type: ignore[no-untyped-call]
    return parts.flatten(0, 1)


def by_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: (all tokens, heads of this rank, head_dim) → (tokens of this part, all heads, head_dim)."""
    parts: Tensor = _AllToAll.apply(x.unflatten(0, (group.size(), -1)), group)  # type: ignore[no-untyped-call]
    return parts.movedim(0, 1).flatten(1, 2)


def joined(values: Tensor, share: Share, group: dist.ProcessGroup | None) -> Tensor:
    """(…, n) values of this rank's `share` → (…, total) values of all ranks, on each of them. Collective.

    Each rank may compute the same loss from all values: in the backward pass it keeps only the gradient of its own values.
    So the gradients of parameters add up over the ranks to those of that loss."""
    if group is None:
        return values
    whole: Tensor = _Join.apply(values, share, group)  # type: ignore[no-untyped-call]
    return whole


class _AllToAll(Function):
    """Sends x[i] to rank i and returns what all ranks sent here, in their order. It is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: Share, group: dist.ProcessGroup) -> Tensor:
        ctx.share = share
        whole = values.new_zeros(*values.shape[:-1], share.total)
        whole[..., share.first : share.end] = values
        dist.all_reduce(whole, group=group)  # a sum, in which each value meets only zeros
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][..., ctx.share.first : ctx.share.end], None, None
