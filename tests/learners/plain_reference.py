"""What the engine must equal: plain transformers and torch, one sample at a time, written from the definitions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from learners.batching import Pair, Sample
from learners.config import LearnerConfig, LossConfig


def token_logprobs(
    model: torch.nn.Module, ids: NDArray[np.int32], temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    tokens = torch.from_numpy(ids.astype(np.int64))
    logits = model(input_ids=tokens[None]).logits[0, :-1].to(dtype) / temperature
    return logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


def plain_logprobs(path: Path, ids: NDArray[np.int32], temperature: float = 1.0) -> NDArray[np.float32]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return token_logprobs(model, ids, temperature).numpy()


def plain_policy_training(
    path: Path, samples: Sequence[Sample], config: LearnerConfig, loss: LossConfig, num_steps: int
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """On-policy DAPO with TIS: ratio 1, so the loss is −mean of w·A over the tokens, with gradient −w·A·∇log π."""
    assert loss.algorithm == "dapo"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    num_tokens = sum(int(s.mask.sum()) for s in samples)
    metrics = []
    for _ in range(num_steps):
        total = 0.0
        for sample in samples:
            mask = torch.from_numpy(sample.mask)
            logprobs = token_logprobs(model, sample.ids)[sample.prompt_len - 1 :][mask]
            assert sample.behaviour_logprobs is not None
            behaviour = torch.from_numpy(sample.behaviour_logprobs)[mask]
            weight = (logprobs.detach() - behaviour).exp().clamp(max=loss.is_max)
            ratio = (logprobs - logprobs.detach()).exp()
            part = -(weight * sample.advantage * ratio).sum() / num_tokens
            part.backward()
            total += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics.append({"loss": total, "grad_norm": norm.item()})
    return {name: p.detach() for name, p in model.named_parameters()}, metrics


def plain_policy_training_with_kl(
    path: Path, samples: Sequence[Sample], config: LearnerConfig, loss: LossConfig, num_steps: int
) -> dict[str, Tensor]:
    """On-policy GRPO or DAPO with TIS and a k3 penalty, every sample passed and every one in the mean, in float64."""
    assert loss.algorithm in ("grpo", "dapo")
    assert loss.kl_estimator == "k3"
    model, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    num_tokens = sum(int(s.mask.sum()) for s in samples)
    for _ in range(num_steps):
        for sample in samples:
            mask = torch.from_numpy(sample.mask)
            if not mask.any():
                continue
            logprobs = token_logprobs(model, sample.ids, dtype=torch.float64)[sample.prompt_len - 1 :][mask]
            with torch.no_grad():
                held_to = token_logprobs(reference, sample.ids, dtype=torch.float64)[sample.prompt_len - 1 :][mask]
            assert sample.behaviour_logprobs is not None
            behaviour = torch.from_numpy(sample.behaviour_logprobs)[mask]
            weight = (logprobs.detach() - behaviour).exp().clamp(max=loss.is_max)
            gain = weight * sample.advantage * (logprobs - logprobs.detach()).exp()
            penalty = (held_to - logprobs).exp() - 1 - (held_to - logprobs)
            tokens = loss.kl_coef * penalty - gain
            part = tokens.mean() / len(samples) if loss.algorithm == "grpo" else tokens.sum() / num_tokens
            part.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().float() for name, p in model.named_parameters()}


def plain_scores(path: Path, sequences: Sequence[NDArray[np.int32]], dtype: torch.dtype = torch.float32) -> list[float]:
    """All in one padded batch, as anybody would who follows Hugging Face's documentation."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), model.config.pad_token_id)
    attended = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        attended[row, : len(sequence)] = 1
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=attended).logits[:, 0].float().tolist()


def plain_pair_training(
    path: Path, pairs: Sequence[Pair], config: LearnerConfig, num_steps: int
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Bradley–Terry by log(1 + e^(margin − gap)), one sequence at a time, in float64."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0
    )
    metrics = []
    for _ in range(num_steps):
        losses, gaps = [], []
        for pair in pairs:
            sides = [torch.from_numpy(side.astype(np.int64))[None] for side in (pair.chosen, pair.rejected)]
            chosen, rejected = (model(input_ids=side).logits[0, 0] for side in sides)
            gaps.append((chosen - rejected).item())
            losses.append(torch.log1p(torch.exp(pair.margin - (chosen - rejected))))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        accuracy = float(np.mean([gap > 0 for gap in gaps]))
        metrics.append(
            {"loss": loss.item(), "accuracy": accuracy, "margin_mean": float(np.mean(gaps)), "grad_norm": norm.item()}
        )
    return {name: p.detach().float() for name, p in model.named_parameters()}, metrics
