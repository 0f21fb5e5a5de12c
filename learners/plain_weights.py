"""The weights in the usual form: Hugging Face names, whole tensors, adapters merged in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from learners import adapters

GATHER_BYTES = 256 << 20  # ZeRO-3 parameters are gathered for reading in blocks of about this size


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """One tensor of the plain model, and the parameters from which it is made."""

    name: str
    parameter: Any  # with ZeRO-3: partitioned
    adapted: Any = None  # the layer whose adapter changes it, or None

    @property
    def sources(self) -> tuple[Any, ...]:
        """All parameters that must be whole for `tensor`."""
        if not isinstance(self.parameter, nn.Parameter):
            return ()  # a buffer, which ZeRO doesn't partition
        return (self.parameter, *(() if self.adapted is None else adapters.lora_matrices(self.adapted)))

    def tensor(self) -> Tensor:
        whole: Tensor = self.parameter.detach() if self.adapted is None else adapters.merged(self.adapted)
        return whole


def plain_weights(lm: nn.Module, *, has_adapters: bool) -> list[PlainWeight]:
    """All weights in model order, tied weights once; then the buffers that checkpoints contain, such as a router's
    `e_score_correction_bias`. Without them it would be another model."""
    kept = lm.state_dict().keys()
    buffers = [PlainWeight(name, buffer) for name, buffer in lm.named_buffers() if name in kept]
    if not has_adapters:
        return [*(PlainWeight(name, parameter) for name, parameter in lm.named_parameters()), *buffers]
    adapted = adapters.layers(lm)
    found = []
    for name, parameter in lm.named_parameters():
        layer_name, _, rest = name.rpartition(".base_layer.")
        if layer_name in adapted:
            layer = adapted[layer_name] if rest == "weight" else None  # an adapter doesn't change a bias
            found.append(PlainWeight(f"{layer_name}.{rest}", parameter, layer))
        elif not any(name.startswith(f"{adapter}.lora_") for adapter in adapted):
            found.append(PlainWeight(name, parameter))
    return [*found, *buffers]


def adapter_weights(lm: nn.Module) -> list[PlainWeight]:
    """All that is trained with adapters: their matrices by peft's names, then the parameters of a scalar head."""
    found = [
        PlainWeight(adapters.peft_name(name, matrix), parameter)
        for name, layer in adapters.layers(lm).items()
        for matrix, parameter in zip(("lora_A", "lora_B"), adapters.lora_matrices(layer), strict=True)
    ]
    known = {id(weight.parameter) for weight in found}
    rest = [(name, p) for name, p in lm.named_parameters() if p.requires_grad and id(p) not in known]
    return [*found, *(PlainWeight(adapters.PREFIX + name, parameter) for name, parameter in rest)]


def whole_tensors(weights: Sequence[PlainWeight], *, partitioned: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors. If `partitioned` (ZeRO-3), they are gathered block by block, which is collective. A tensor is
    valid only until the next one is requested. The iterator must be exhausted on all ranks."""
    if not partitioned:
        for weight in weights:
            yield weight.name, weight.tensor()
        return
    import deepspeed

    block: list[PlainWeight] = []
    size = 0
    for i, weight in enumerate(weights):
        block.append(weight)
        size += sum(p.ds_numel * p.element_size() for p in weight.sources)
        if size >= GATHER_BYTES or i == len(weights) - 1:
            with deepspeed.zero.GatheredParameters([p for w in block for p in w.sources]):
                for gathered in block:
                    yield gathered.name, gathered.tensor()
            block, size = [], 0
