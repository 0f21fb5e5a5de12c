"""The policy loss: a `PolicyObjective`, the correction for the engine's sampling policy, and the KL penalty.

A policy loss uses three policies (decoupled objective, AReaL, arXiv 2505.24298):

    behaviour  the policy with which the engine sampled, some versions old and computed by other kernels
    proximal   `old`: the learner's policy before this batch's first update; the centre of the trust region
    current    the policy that is differentiated

The clipped ratio is current/proximal; proximal/behaviour is a detached, truncated (TIS) or masked (MIS) weight.

Shapes: B sequences, T response tokens (padded). All means are over *global* counts that the caller passes in, so the
losses (and metrics) of micro-batches on all ranks add up to those of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learners.config import LossConfig
from learners.losses.objective import BatchCounts, sequence_mean

Metrics = dict[str, Tensor]
"""Scalars. Those whose names end in `_max` are combined by maximum, all others by addition."""

LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: far outside any clip range and well within float32


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: LossConfig,
    *,
    num_tokens_global: float,
    num_sequences_global: float,
    num_tokens_passed: int | None = None,
    ref_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    on_policy: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """One micro-batch's share of the batch's loss.

    Args:
        logprobs: (B, T) of the sampled tokens under the current policy; carries the gradient. old_logprobs: (B, T) under
        the proximal policy; `logprobs.detach()` if this is the batch's only update. behaviour_logprobs: (B, T) as the
        engine reported them. advantages: (B,), one for each sequence, or (B, T). mask: (B, T), True on tokens to train
        on. Everything else is ignored, whatever its values. config: algorithm, clip range, correction and KL.
        num_tokens_global: loss tokens of the whole batch, over all micro-batches and ranks. It is larger than the count
            in all masks if samples without a gradient were left out (`batching.minibatches`).
        num_sequences_global: sequences of the whole batch, counted in the same way.
        num_tokens_passed: True entries of `mask` over all micro-batches and ranks, over which metrics are means. None: the
            same as `num_tokens_global`.
        ref_logprobs: (B, T) under the frozen reference; needed exactly if `config.kl_coef > 0`.
        entropies: (B, T), which are only reported.
        on_policy: (B,), True for sequences that the engine sampled with the proximal policy's weights. On their tokens
            engine and learner differ by rounding alone: metrics `on_policy_tokens`, their number, and `on_policy_diff` and
            `on_policy_kl`, the sums of |Δ logprob| and of k3 over them.

    Returns:
        The loss, a scalar whose sum over micro-batches is the batch's loss, and detached metrics.
    """
    assert (ref_logprobs is not None) == (config.kl_coef > 0)
    assert not old_logprobs.requires_grad
    num_passed = max(num_tokens_global if num_tokens_passed is None else num_tokens_passed, 1)
    num_tokens_global, num_sequences_global = max(num_tokens_global, 1), max(num_sequences_global, 1)
    # Masked entries may hold anything (padding, NaN from an engine). They are set to zero before any arithmetic, as 0 · NaN
    # is NaN, also in the backward pass.
    logprobs, old_logprobs, behaviour_logprobs = (
        torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, behaviour_logprobs)
    )
    if advantages.dim() == 1:
        advantages = advantages[:, None]

    log_ratio = logprobs - old_logprobs
    objective = config.objective
    if objective.ratio_level == "sequence":
        log_ratio = sequence_mean(log_ratio, mask)  # (B, 1)
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    token_loss, clipped = objective.token_loss(ratio, logprobs, advantages, config.clip_range)

    weight, corrected = importance_weight(old_logprobs, behaviour_logprobs, mask, config)
    token_loss = token_loss * weight
    metrics: dict[str, Tensor] = {}
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, torch.where(mask, ref_logprobs, 0.0), config.kl_estimator)
        token_loss = token_loss + config.kl_coef * kl
        metrics["kl_ref"] = (kl.detach() * mask).sum() / num_passed

    counts = BatchCounts(
        num_tokens=num_tokens_global,
        num_sequences=num_sequences_global,
        max_response_tokens=config.max_response_tokens,
    )
    loss = objective.mean(token_loss.expand_as(mask), mask, counts)

    with torch.no_grad():

        def mean(x: Tensor) -> Tensor:
            return (x * mask).sum() / num_passed

        drift = old_logprobs - behaviour_logprobs
        metrics |= {
            "loss": loss.detach(),
            "ratio_mean": mean(ratio),
            "ratio_max": masked_max(ratio, mask),
            "clip_fraction": mean(clipped),
            "is_weight_mean": mean(weight),
            "is_corrected_fraction": mean(corrected),
            "engine_kl": mean(
                torch.exp(drift.clamp(max=LOG_RATIO_LIMIT)) - 1 - drift
            ),  # k3 of KL(behaviour ‖ proximal)
            "logprob_diff_max": masked_max(drift.abs(), mask),
        }
        if on_policy is not None:
            same = mask & on_policy[:, None]
            metrics |= {
                "on_policy_tokens": same.sum().float(),
                "on_policy_diff": (drift.abs() * same).sum(),
                "on_policy_kl": ((torch.exp(drift.clamp(max=LOG_RATIO_LIMIT)) - 1 - drift) * same).sum(),
            }
        if entropies is not None:
            metrics["entropy"] = mean(torch.where(mask, entropies, 0.0))
    return loss, metrics


def importance_weight(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Detached weight proximal/behaviour, (B, T) or (B, 1), and where it was truncated (TIS) or dropped (MIS)."""
    drift = torch.where(mask, old_logprobs - behaviour_logprobs, 0.0).detach()
    if config.sequence_level_is:
        drift = drift.sum(-1, keepdim=True)
    ratio = torch.exp(drift.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    if config.is_correction == "none":
        return torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)
    if config.is_correction == "tis":
        return ratio.clamp(max=config.is_max), ratio > config.is_max
    outside = (ratio > config.is_max) | (ratio < (config.is_min or 0.0))
    return ratio.masked_fill(outside, 0.0), outside


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(current ‖ reference), (B, T), to be minimised (Schulman, "Approximating KL Divergence").

    As a loss, k1's own gradient is ∇log π, which is zero in expectation and so no penalty. So k1 has its own value but k2's
    gradient, k1·∇log π, which is the gradient of a KL penalty inside the reward.
    """
    k1 = logprobs - ref_logprobs
    if estimator == "k3":
        return torch.exp((-k1).clamp(max=LOG_RATIO_LIMIT)) - 1 + k1
    k2 = 0.5 * k1.square()
    return k2 if estimator == "k2" else k2 + (k1 - k2).detach()


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """Largest entry where `mask` is True; 0 if there is none. It is used only for non-negative quantities."""
    return torch.where(mask, x, 0.0).max() if mask.any() else x.new_zeros(())
