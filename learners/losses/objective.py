"""The parts of a policy objective, and functions that several objectives share. Imports no torch, as settings read it, too.

An objective is one `PolicyObjective` in a file of its own and a line in `registry.LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCounts:
    """Counts of the whole batch, over all micro-batches and ranks. Each is at least 1."""

    num_tokens: float
    num_sequences: float
    max_response_tokens: int | None  # the constant length, for an objective with `needs_length`


ClipRange = tuple[float, float]
"""(ε_low, ε_high): the ratio is bounded by 1 − ε_low and 1 + ε_high."""

TokenLoss = Callable[["Tensor", "Tensor", "Tensor", ClipRange], "tuple[Tensor, Tensor]"]
"""(ratio, logprobs, advantages, clip range) → (loss of each token, where it was clipped). Shapes: ratio (B, T), or (B, 1)
with one ratio for each sequence; logprobs (B, T), with the gradient; advantages (B, T) or (B, 1); results like the ratio,
or (B, T)."""

Mean = Callable[["Tensor", "Tensor", BatchCounts], "Tensor"]
"""(token losses (B, T), mask (B, T), counts) → scalar. The scalars of all micro-batches add up to the batch's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObjective:
    """A policy objective. No part has a default, so that a missing part is an error when the file is imported."""

    name: str
    """Its name in `loss.algorithm`."""
    clip_range: ClipRange
    """The published clip range."""
    ratio_level: Literal["token", "sequence"]
    """Whether current/proximal is one ratio for each token, or the geometric mean over each sequence."""
    token_loss: TokenLoss
    mean: Mean
    advantage_scale: Literal["std", "none"]
    """The meaning of `loss.advantage_scale = "auto"`: divide by the standard deviation of the group's rewards, or not."""
    needs_length: bool
    """Whether `mean` divides by `loss.max_response_tokens`."""


# --- token losses -----------------------------------------------------------------------------------------------------


def clipped_surrogate(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_range: ClipRange
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic bound: −min(r·A, clip(r)·A) (arXiv 1707.06347, eq. 7)."""
    low, high = clip_range
    unclipped, bounded = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return -unclipped.minimum(bounded), clipped


def clipped_weight(ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_range: ClipRange) -> tuple[Tensor, Tensor]:
    """−sg(clip(r))·A·log π (CISPO, arXiv 2506.13585, eq. 4). Clipped tokens keep a gradient, so that rare but decisive
    tokens are still learned."""
    low, high = clip_range
    clipped = (ratio < 1 - low) | (ratio > 1 + high)
    return -ratio.clamp(1 - low, 1 + high).detach() * advantages * logprobs, clipped


# --- means ------------------------------------------------------------------------------------------------------------


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) → (B, 1): mean over each row's True entries; 0 for a row without any."""
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def mean_of_sequence_means(token_loss: Tensor, mask: Tensor, counts: BatchCounts) -> Tensor:
    """A mean in which every sequence has the same weight, whatever its length."""
    return sequence_mean(token_loss, mask).sum() / counts.num_sequences


def mean_of_tokens(token_loss: Tensor, mask: Tensor, counts: BatchCounts) -> Tensor:
    """A mean in which every token of the batch has the same weight."""
    return (token_loss * mask).sum() / counts.num_tokens


def sum_over_constant_length(token_loss: Tensor, mask: Tensor, counts: BatchCounts) -> Tensor:
    """Sums of sequences, divided by one constant length, so that a token's weight doesn't depend on its sequence's
    length."""
    assert counts.max_response_tokens is not None
    return (token_loss * mask).sum() / (counts.num_sequences * counts.max_response_tokens)
