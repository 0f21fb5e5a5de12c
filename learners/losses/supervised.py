"""The losses of the supervised stages: next-token prediction, and preference between the sides of a pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from learners.losses.policy import Metrics


def sft_loss(logprobs: Tensor, mask: Tensor, *, num_tokens_global: int) -> tuple[Tensor, Metrics]:
    """Next-token loss, mean over all tokens of the batch where `mask` (B, T) is True. Losses of micro-batches add up."""
    loss = -torch.where(mask, logprobs, 0.0).sum() / max(num_tokens_global, 1)
    return loss, {"loss": loss.detach(), "num_tokens": mask.sum()}


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margins: Tensor, *, num_pairs_global: int
) -> tuple[Tensor, Metrics]:
    """−log σ(chosen − rejected − margin), mean over all pairs of the batch. Losses of micro-batches add up.

    Args:
        chosen: (N,) scores of the preferred sides; N may be 0.
        rejected: (N,) scores of the others.
        margins: (N,) by how much the preferred side should win, in logits (Llama 2, arXiv 2307.09288, eq. 2).
        num_pairs_global: pairs in the whole batch, over all micro-batches and ranks.

    Returns:
        The loss and detached metrics: `accuracy` (a tie counts half) and `margin_mean`, the mean of chosen − rejected.
    """
    num_pairs_global = max(num_pairs_global, 1)
    gaps = chosen - rejected
    loss = -F.logsigmoid(gaps - margins).sum() / num_pairs_global
    with torch.no_grad():
        right = (gaps > 0) + 0.5 * (gaps == 0)
        metrics = {
            "loss": loss.detach(),
            "accuracy": right.sum() / num_pairs_global,
            "margin_mean": gaps.sum() / num_pairs_global,
        }
    return loss, metrics
