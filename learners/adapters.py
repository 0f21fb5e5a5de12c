"""Low-rank adapters in a Hugging Face model, by `peft`: add them, disable them for a while, merge them into copies, and
write them in peft's own format.

Their weights are float32, whatever the model's type is. In bfloat16 a step of a small learning rate would be rounded away:
the neighbours of 0.01 are 6e-5 apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from learners.config import LoraConfig
from models.scalar import HEAD

NAME = "default"  # peft's own name for the only adapter

WEIGHTS_FILE = "adapter_model.safetensors"
"""Peft's name for the file with an adapter's weights, beside its `adapter_config.json`."""

PREFIX = "base_model.model."
"""Peft's files have this before a layer's name in the model."""


def inject(lm: Any, config: LoraConfig) -> None:
    """Add new adapters to `lm`, in place, and freeze everything else except a scalar head.

    Their initial values come from torch's global generator, and have no effect until the first step.

    Raises:
        ValueError: a target that isn't there, isn't a linear layer or shares its weight with another layer.
    """
    import peft

    has_head = isinstance(getattr(lm, HEAD, None), nn.Module)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # peft's annotation says int, but its arithmetic accepts a float
            lora_dropout=config.dropout,
            target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
            exclude_modules=[HEAD] if has_head else None,  # the head is trained as a whole, see below
        ),
        lm,
        NAME,
    )
    embedding = lm.get_input_embeddings().weight
    for name, layer in layers(lm).items():
        if not isinstance(layer.base_layer, nn.Linear):
            raise ValueError(f"lora.targets: {name} is a {type(layer.base_layer).__name__}, not a linear layer")
        if layer.base_layer.weight is embedding:
            raise ValueError(f"lora.targets: {name} shares its weight with the input embedding")
        layer.cast_input_dtype_enabled = (
            False  # else peft would keep a float32 copy of each input for the backward pass
        )
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[NAME] = _Float32Weight(matrices[NAME].weight)
    if has_head:
        getattr(lm, HEAD).float().requires_grad_(True)


class _Float32Weight(nn.Module):
    """A linear map whose weight is float32. The product is in the input's type, as in the engines, and the gradient is
    float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def layers(lm: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by the names of these layers in the model without adapters."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def switched_off(lm: nn.Module) -> Iterator[None]:
    """A context in which `lm` computes as it did without adapters."""
    found = list(layers(lm).values())
    for layer in found:
        # Not `enable_adapters(False)`, which would also exclude the adapters from training.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in found:
            layer._disable_adapters = False


def lora_matrices(layer: Any) -> tuple[Any, Any]:
    """The parameters A (rank, in) and B (out, rank) of a layer's adapter."""
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


def merged(layer: Any) -> Tensor:
    """W + alpha/rank · B·A in W's type, computed in float32; a copy. With ZeRO-3 all three must be gathered."""
    a, b = lora_matrices(layer)
    weight = layer.base_layer.weight.detach()
    delta = layer.scaling[NAME] * (b.detach().float() @ a.detach().float())
    result: Tensor = (weight.to(torch.float32, copy=True).add_(delta)).to(weight.dtype)
    return result


def peft_name(layer_name: str, matrix: str) -> str:
    """The name in peft's files of a layer's `matrix`: lora_A, of shape (rank, in), or lora_B, of shape (out, rank)."""
    return f"{PREFIX}{layer_name}.{matrix}.weight"


def save(lm: Any, tensors: dict[str, Tensor], path: Path, *, base: str) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads on top of the model `base`.

    `tensors` are named by `peft_name`, or `PREFIX` and the name of a parameter of the scalar head."""
    path.mkdir()
    has_head = any(name.startswith(f"{PREFIX}{HEAD}.") for name in tensors)
    replace(
        lm.peft_config[NAME],
        base_model_name_or_path=base,
        task_type="SEQ_CLS" if has_head else "CAUSAL_LM",
        inference_mode=True,
        exclude_modules=None,
        modules_to_save=[HEAD] if has_head else None,
    ).save_pretrained(path)
    save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
