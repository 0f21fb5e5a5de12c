"""Wraps a model into DeepSpeed: ZeRO, AdamW over the trained parameters, and our own gradient accumulation.

If the norm of a gradient is not finite, the gradient is dropped on all ranks and no step is taken. DeepSpeed's optimizers do
this, and `GuardedAdamW` does it in the one mode in which DeepSpeed leaves the step to torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from learners.config import BUCKET_ELEMENTS, LearnerConfig


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips the gradient, keeps its norm, and takes no step if the norm isn't finite.

    DeepSpeed's own optimizers do the same. Without ZeRO, in float32, DeepSpeed calls the optimizer that it was given,
    after averaging the gradients over the ranks, so all ranks see the same norm. It reads `overflow` and
    `_global_grad_norm` (0.19).
    """

    def __init__(self, params: Any, *, max_norm: float, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._max_norm = max_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's returns the closure's loss
        assert closure is None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if self._max_norm:
            torch.nn.utils.clip_grads_with_norm_(
                [p for group in self.param_groups for p in group["params"]], self._max_norm, norm
            )
        super().step()


def gather_with(module: nn.Module, used: nn.Module) -> None:
    """Have ZeRO-3 gather the own parameters of `used` for each pass through `module`, which calls `used.forward` instead of
    `used`."""
    deepspeed = _imported(next(used.parameters()).device)
    for parameter in used.parameters(recurse=False):
        deepspeed.zero.register_external_parameter(module, parameter)


@contextmanager
def partitioned_load(config: LearnerConfig, device: torch.device) -> Iterator[None]:
    """With ZeRO-3, `from_pretrained` inside this context gives every rank only its partition of each parameter: rank 0 reads
    one layer after another and sends it to the others, so that the whole model is never on one device. Collective."""
    if config.zero_stage != 3:
        yield
        return
    _imported(device)
    # transformers keeps a weak reference to it, and asks for it wherever it makes or fills parameters.
    known = HfDeepSpeedConfig(_settings(config, BUCKET_ELEMENTS, bf16=config.in_bfloat16))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del known


def _settings(config: LearnerConfig, num_elements: int, *, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's own settings, for gradients of this many elements. With `bf16`, DeepSpeed makes all of it bfloat16."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # Accumulation is ours: one backward() for each micro-batch, however many there are, then one step().
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if _guarded(config, bf16) else config.max_grad_norm,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            # DeepSpeed allocates a whole bucket, however few gradients there are.
            "reduce_bucket_size": min(num_elements, BUCKET_ELEMENTS),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if bf16 and config.zero_stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _guarded(config: LearnerConfig, bf16: bool) -> bool:
    """Whether DeepSpeed leaves the step to torch's optimizer."""
    return config.zero_stage == 0 and not bf16


def wrap(model: nn.Module, config: LearnerConfig, device: torch.device, *, frozen: bool = False) -> Any:
    """DeepSpeed's engine around `model`. With `frozen` it only shards the model and has no optimizer. Collective."""
    deepspeed = _imported(device)
    # Adapters are float32 in a model of any type. All that is trained is float32 then, and nothing may be cast.
    bf16 = config.in_bfloat16 and config.lora is None
    guarded = _guarded(config, bf16)
    num_elements = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or frozen)
    settings = _settings(config, num_elements, bf16=bf16)
    if frozen:
        engine, *_ = deepspeed.initialize(model=model, config=settings)
        return engine
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if _num_dimensions(p) >= 2]
    plain = [p for p in trained if _num_dimensions(p) < 2]  # norms and biases have no weight decay
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if group
    ]
    settings_of_adam: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    params = groups if config.weight_decay > 0 else trained
    optimizer = (
        GuardedAdamW(params, max_norm=config.max_grad_norm, **settings_of_adam)
        if guarded
        else torch.optim.AdamW(params, **settings_of_adam)
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def _num_dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # a partitioned one is empty


def _imported(device: torch.device) -> Any:
    """DeepSpeed, for this kind of device."""
    # These variables are read when DeepSpeed is imported. Every rank sees exactly one device.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # On CPU this op would be compiled (102 s, and it fails without a compiler); gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
