"""A model wrapped into DeepSpeed: ZeRO, AdamW over what trains, gradients clipped and accumulated by us."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from learners.config import LearnerConfig
from learners.model import training_dtype

BUCKET_ELEMENTS = 500_000_000
"""Gradients are reduced in buckets of at most this many elements: DeepSpeed's own default."""


def wrap(model: nn.Module, config: LearnerConfig, device: torch.device, *, frozen: bool = False) -> Any:
    """DeepSpeed's engine around `model`; `frozen`: only to shard it, without an optimizer. Collective."""
    # Read when DeepSpeed is imported. Every rank sees exactly one device.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # On CPU this op would be compiled (102 s, and a failure without a compiler); gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    bf16 = training_dtype(config, device) == torch.bfloat16
    num_elements = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        # We own the accumulation: backward() per micro-batch, however many there are, then one step().
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            # DeepSpeed allocates a bucket whole, however small the model.
            "reduce_bucket_size": min(num_elements, BUCKET_ELEMENTS),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if bf16 and config.zero_stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if frozen:
        engine, *_ = deepspeed.initialize(model=model, config=settings)
        return engine
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2]
    plain = [p for p in trained if p.dim() < 2]  # norms and biases are not decayed
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "weight_decay": decay}
            for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
            if group
        ]
        if config.weight_decay > 0
        else trained,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if config.zero_stage == 0 and not bf16:
        # In this mode alone DeepSpeed 0.19 clips without keeping the norm that it has computed.
        def clip_and_keep_norm() -> None:
            engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)

        engine.clip_fp32_gradients = clip_and_keep_norm
    return engine
