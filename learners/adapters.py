"""Low-rank adapters in a Hugging Face model, by `peft`: add them, disable them for a while, merge them into copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from learners.config import LoraConfig
from models.scalar import HEAD

NAME = "default"  # peft's own name for the only adapter


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
    if has_head:
        getattr(lm, HEAD).requires_grad_(True)


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
