"""The weights in the form that engines need: with the names and shapes of the checkpoint from which training started.

transformers (5) loads some layers in another form than the checkpoint has. For example, it fuses the experts of a mixture
into one tensor a layer. Its own `save_pretrained` converts them back by rules that the loaded model keeps. Here these rules
are applied to one tensor at a time, so that the whole model needn't be in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from learners.plain_weights import PlainWeight, plain_weights
from models.on_disk import tensor_shapes


@dataclass(frozen=True, slots=True)
class Published:
    """Name, shape and type of one tensor, which are needed before it is sent."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def published(lm: Any, weights: Iterable[PlainWeight]) -> list[Published]:
    """All tensors in the order of `as_in_checkpoint`, without touching the weights."""
    return [
        Published(name, tuple(tensor.shape), tensor.dtype)
        for weight in weights
        for name, tensor in _converted(lm, weight.name, _shape_only(weight.parameter))
    ]


def published_adapter(weights: Iterable[PlainWeight], dtype: torch.dtype) -> list[Published]:
    """All tensors in the order of `as_engines_take_it`, without touching the weights."""
    return [Published(weight.name, tuple(_shape_only(weight.parameter).shape), dtype) for weight in weights]


def as_engines_take_it(
    tensors: Iterable[tuple[str, Tensor]], scale: float, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """An adapter's matrices with peft's names, in `dtype`. B is multiplied by `scale`, in float32, so that engines needn't
    know it. Each tensor is valid only until the next one is requested."""
    for name, tensor in tensors:
        yield name, (tensor * scale if ".lora_B." in name else tensor).to(dtype)


def as_in_checkpoint(lm: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Convert training's names and tensors to the checkpoint's. Each tensor is valid only until the next one is
    requested."""
    for name, tensor in tensors:
        yield from _converted(lm, name, tensor)


def check_folder(model: str) -> None:
    """`check` before any weight is read, as transformers reads only headers for the meta device. Raises ValueError
    as `check`, and ValueError or OSError for a checkpoint that can't be loaded."""
    transformers_logging.disable_progress_bar()  # it would show how nothing is loaded
    lm = AutoModelForCausalLM.from_pretrained(model, device_map="meta", attn_implementation="eager")
    check(lm, plain_weights(lm, has_adapters=False), model)


def check(lm: Any, weights: Iterable[PlainWeight], model: str) -> None:
    """Raises ValueError unless the tensors to send are those of the checkpoint in the folder `model`, which engines
    expect."""
    try:
        sent = {tensor.name: tensor.shape for tensor in published(lm, weights)}
    except Exception as error:  # rules that need several tensors at once may raise anything
        raise ValueError(
            f"{model}: the weights of {type(lm).__name__} can't be sent to the engines one by one, as transformers loads "
            f"them in another form than the checkpoint has: {error!r}. GRPO can't train this model"
        ) from error
    held = tensor_shapes(model)
    missing, unknown = sorted(held.keys() - sent.keys()), sorted(sent.keys() - held.keys())
    other = [name for name in sorted(held.keys() & sent.keys()) if held[name] != sent[name]]
    faults = [
        f"{what}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (
            ("the checkpoint holds tensors that training doesn't have", missing),
            ("training has tensors that the checkpoint lacks", unknown),
            ("shapes differ", other),
        )
        if names
    ]
    if faults:
        raise ValueError(
            f"{model}: engines couldn't take new weights, as {type(lm).__name__} has other tensors in training than in its "
            f"checkpoint ({'; '.join(faults)}). A copy without what training doesn't have can be trained by GRPO: load the "
            "model with transformers' AutoModelForCausalLM, and save_pretrained to another folder"
        )


def _converted(lm: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    found: dict[str, Tensor] = revert_weight_conversion(lm, {name: tensor})
    yield from found.items()


def _shape_only(parameter: Any) -> Tensor:
    """A tensor with only a shape, since with ZeRO-3 a parameter itself is empty."""
    return torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")
