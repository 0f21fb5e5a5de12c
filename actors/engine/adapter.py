"""One adapter in a vLLM engine: how it is handed over, and what a worker holds of it.

vLLM loads an adapter from a folder in peft's format, in place of the one of the same id. All requests name this adapter,
from the engine's start on, also those that run during the change: what they sample next is sampled with the new weights. The
first adapter is zero, as a request that began without one would stay without one.

The sums (`held_sums`) and `hold_zero_adapter` run inside a worker.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.config import ADAPTER_RANKS
from models.checksums import PieceSum, checksum, piece_of
from models.weight_update import WeightUpdate

ID = 1
"""vLLM's number of the only adapter; it counts from 1."""

A, B = ".lora_A.weight", ".lora_B.weight"
"""Endings of the names: A is (rank, in), B is (out, rank). Before them stands `base_model.model.` and the layer's name."""

PREFIX = "base_model.model."

OUTPUT_LAYER = "lm_head"


def request(folder: Path | None = None) -> Any:
    """vLLM's request for the adapter: to load it anew from `folder`, or (None) to sample with the one that is loaded."""
    from vllm.lora.request import LoRARequest

    if folder is None:
        return LoRARequest("policy", ID, "loaded before")
    return LoRARequest("policy", ID, str(folder), load_inplace=True)


def smallest_rank(rank: int) -> int:
    """The smallest rank that vLLM can reserve for adapters of `rank`."""
    return min(number for number in ADAPTER_RANKS if number >= rank)


@contextmanager
def as_folder(update: WeightUpdate, tensors: Path) -> Iterator[Path]:
    """A folder in peft's format around the file `tensors`, as long as the block runs.

    `alpha` equals the rank, as B already contains the scale."""
    rank = adapter_rank(update)
    description = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers_of(update)}
    with tempfile.TemporaryDirectory(prefix="autotraj-adapter-") as name:
        folder = Path(name)
        (folder / "adapter_config.json").write_text(json.dumps(description))
        (folder / "adapter_model.safetensors").symlink_to(tensors)
        yield folder


def adapter_rank(update: WeightUpdate) -> int:
    """The rank of the adapter in `update`: that of all its matrices, see `check`."""
    return update.shapes[0][0] if update.names[0].endswith(A) else update.shapes[0][1]


def layers_of(update: WeightUpdate) -> list[str]:
    """The names of the layers with an adapter."""
    return [name.removeprefix(PREFIX).removesuffix(A) for name in update.names if name.endswith(A)]


def check(update: WeightUpdate, expected: Mapping[str, Sequence[int]], *, max_rank: int) -> None:
    """Raises ValueError unless `update` is an adapter of one rank, at most `max_rank`, that fits the checkpoint, which has
    tensors of the shapes `expected`."""
    shapes = dict(zip(update.names, update.shapes, strict=True))
    what = f"the adapter of policy version {update.policy_version}"
    if not shapes or {name for name in shapes if not name.endswith((A, B))}:
        raise ValueError(f"{what} has other tensors than pairs of {A} and {B}: {sorted(shapes)[:3]} (the first three)")
    rank = adapter_rank(update)
    if rank > max_rank:
        raise ValueError(f"{what} has rank {rank}, and the engine was started for {max_rank} (engine.adapter_rank)")
    for layer in layers_of(update):
        if layer.rpartition(".")[2] == OUTPUT_LAYER:
            raise ValueError(f"{what} has one of the output layer, which engines don't take (learner.lora.targets)")
        a, b = shapes[f"{PREFIX}{layer}{A}"], shapes.get(f"{PREFIX}{layer}{B}", (0, 0))
        if (a[0], b[1]) != (rank, rank):
            raise ValueError(f"{what}: {layer} has matrices of {a} and {b}, which aren't both of rank {rank}")
        whole = expected.get(f"{layer}.weight", (b[0], a[1]))
        if (b[0], a[1]) != tuple(whole):
            raise ValueError(f"{what}: {layer} is {(b[0], a[1])}, and in the engine's checkpoint {tuple(whole)}")


# --- inside a worker ------------------------------------------------------------------------------------------------------


def hold_zero_adapter(model: Any, manager: Any) -> None:
    """Have `manager`, which vLLM's model runner has, hold an adapter that changes nothing.

    The output layer gets none. vLLM's layer with one takes the adapter of each row of logits from the requests that sample,
    but for the logprobs of a prompt there is a row for each of its tokens: beside other requests that ends the core process
    (0.32)."""
    from vllm.lora.layers import LogitsProcessorWithLoRA
    from vllm.lora.utils import replace_submodule

    for name, module in list(model.named_modules()):
        if isinstance(module, LogitsProcessorWithLoRA):
            replace_submodule(model, name, module.base_layer)
    manager.add_dummy_lora(request(), rank=1)


def held_sums(
    model: Any, shapes: Mapping[str, Sequence[int]], *, rank: int, size: int, dtype: torch.dtype
) -> dict[str, PieceSum | str]:
    """The piece of each tensor of the adapter with its checksum, as the kernels of tensor-parallel rank `rank` of `size`
    read it, or why there is none. See `models/checksums.py`."""
    manager = model.lora_manager
    slot = manager.lora_index_to_id.index(ID)
    homes = {name: (module, 0) for name, module in manager.modules.items()}
    for packed, parts in manager.packed_modules.items():
        if packed in manager.modules:
            homes |= {part: (manager.modules[packed], index) for index, part in enumerate(parts)}
    found: dict[str, PieceSum | str] = {}
    for name, shape in shapes.items():
        try:
            piece_sum = _held_sum(homes, model, name, shape, slot=slot, rank=rank, size=size, dtype=dtype)
        except ValueError as error:
            found[name] = str(error)
        else:
            found[name] = piece_sum
    return found


def _held_sum(
    homes: Mapping[str, tuple[Any, int]],
    model: Any,
    name: str,
    shape: Sequence[int],
    *,
    slot: int,
    rank: int,
    size: int,
    dtype: torch.dtype,
) -> PieceSum:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    layer, is_a = parse_fine_tuned_lora_name(name, mapper.get_rename_mapper() if mapper is not None else None)
    if layer not in homes:
        return 0, 0, 0, 0  # vLLM has dropped it, so the engine samples without this part of the policy
    module, index = homes[layer]
    stacked: Sequence[Tensor] | None = getattr(module, "lora_a_stacked" if is_a else "lora_b_stacked", None)
    if stacked is None or index >= len(stacked):
        raise ValueError(f"vLLM doesn't tell where {type(module).__name__} holds it")
    held = stacked[index][slot, 0]
    # There is room for the largest rank.
    held = held[: shape[0]] if is_a else held[:, : shape[1]]
    piece = piece_of(shape, held.shape, rank, size)
    return piece.row, piece.column, held.numel(), int(checksum(held, dtype, piece))
