"""Checksums of what one vLLM worker holds, by the names under which learners publish. It runs inside the worker.

vLLM's own maps say where a published tensor lies: which parameter, and which part of one that holds several, as `qkv_proj`
does. What they don't place, such as experts, which each kernel packs in its own way, is named with the reason.

A GPU's parameters are what its kernels read. On a CPU vLLM packs linear weights for its kernels and drops them; there the
checksum is taken when they are packed, so it is of what the kernels were given in the last update.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.checksums import Piece, PieceSum, as_matrix, checksum, piece_of

HEADS = {"q": 0, "k": 1, "v": 2}
"""vLLM's names of the parts of `qkv_proj`. Parts of other parameters have numbers."""

NOTHING: PieceSum = (0, 0, 0, 0)
"""Of a weight that was packed for the CPU before anybody could take its checksum, and that no update replaced since."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a published tensor lies: a module's parameter or buffer, or that part of it."""

    module: nn.Module
    name: str
    part: int | None


class HeldWeights:
    """What rank `rank` of `size` tensor-parallel ranks holds of tensors with these names and whole `shapes`."""

    def __init__(
        self, model: nn.Module, shapes: Mapping[str, Sequence[int]], *, rank: int, size: int, dtype: torch.dtype
    ) -> None:
        self._shapes = shapes
        self._rank, self._size, self._dtype = rank, size, dtype
        self._homes: dict[str, Home] = {}
        self.unknown: dict[str, str] = {}
        self._when_packed: dict[str, PieceSum] = {}
        tensors = _tensors(model)
        for name in shapes:
            try:
                self._homes[name] = self._home(model, tensors, name)
            except ValueError as error:
                self.unknown[name] = str(error)
        self._sum_before_packing()

    def sums(self, names: Iterable[str]) -> dict[str, PieceSum | str]:
        """The piece of each tensor with its checksum, or why there is none."""
        found: dict[str, PieceSum | str] = {}
        pending: list[tuple[str, Piece, int, Tensor]] = []
        for name in names:
            if name not in self._homes:
                found[name] = self.unknown.get(name, "the engine's checkpoint has no such tensor")
            elif getattr(self._homes[name].module, self._homes[name].name).numel() == 0:
                found[name] = self._when_packed.get(name, NOTHING)
            else:
                pending.append((name, *self._start_sum(name)))
        if pending:
            totals = torch.stack([total for *_, total in pending]).tolist()  # one wait for the device
            for (name, piece, count, _), total in zip(pending, totals, strict=True):
                found[name] = (piece.row, piece.column, count, total)
        return found

    def _home(self, model: nn.Module, tensors: Mapping[str, tuple[nn.Module, str]], name: str) -> Home:
        """Raises ValueError, with the reason, if the tensor has no home that can be summed."""
        for held_name, part in _held_names(model, name):
            if held_name in tensors:
                home = Home(*tensors[held_name], part)
                break
        else:
            raise ValueError("the engine has no parameter of this name, nor of one that vLLM's maps lead to")
        held = getattr(home.module, home.name)
        if not held.is_floating_point() or held.element_size() < 2:
            raise ValueError(f"quantized: the engine holds it as {str(held.dtype).removeprefix('torch.')}")
        if held.numel():
            self._place(name, home)
        return home

    def _place(self, name: str, home: Home) -> tuple[Piece, Tensor]:
        """Where in the whole tensor the piece lies that this rank holds, and that piece."""
        shape = self._shapes[name]
        held: Tensor = getattr(home.module, home.name)
        if (rows := getattr(home.module, "shard_indices", None)) is not None:  # of a vocabulary, which may be padded
            held = held[: rows.num_org_elements]
            if held.shape[1:] != tuple(shape[1:]):
                raise ValueError(f"held as {tuple(held.shape)}, which has no rows of {tuple(shape)}")
            width = as_matrix(held).shape[1] if held.dim() > 1 else shape[0]
            first = rows.org_vocab_start_index
            return (Piece(first, 0, width) if held.dim() > 1 else Piece(0, first, width)), held
        if home.part is not None:
            sizes = getattr(home.module, "output_partition_sizes", [])
            if home.part >= len(sizes):
                raise ValueError(f"vLLM doesn't tell how {type(home.module).__name__} is divided")
            held = held.narrow(0, sum(sizes[: home.part]), sizes[home.part])
        return piece_of(shape, held.shape, self._rank, self._size), held

    def _start_sum(self, name: str) -> tuple[Piece, int, Tensor]:
        piece, held = self._place(name, self._homes[name])
        return piece, held.numel(), checksum(held, self._dtype, piece)

    def _sum_before_packing(self) -> None:
        """From now on, take the checksums of weights that the kernels' packing would leave nothing of."""
        packed: dict[nn.Module, list[str]] = defaultdict(list)
        for name, home in self._homes.items():
            if getattr(home.module, home.name).numel() == 0:
                packed[home.module].append(name)
        for module, names in packed.items():
            method: Any = module.quant_method  # each layer has its own
            method.process_weights_after_loading = self._summing(names, method.process_weights_after_loading)

    def _summing(self, names: Sequence[str], pack: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def process_weights_after_loading(layer: nn.Module) -> None:
            for name in names:
                piece, count, total = self._start_sum(name)
                self._when_packed[name] = (piece.row, piece.column, count, int(total))
            pack(layer)

        return process_weights_after_loading


def _tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Parameters and buffers by their names; those of a layer that vLLM wrapped for adapters by the layer's own name."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{path}.{name}" if path else name
            found[full.replace(".base_layer.", ".")] = (module, name)
    return found


def _held_names(model: Any, name: str) -> Iterable[tuple[str, int | None]]:
    """The engine's names under which `name` may be held, each with the part of that parameter."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = name
    for held_name, data in mapper.apply([(name, torch.empty(0))]) if mapper is not None else ():
        mapped, part = held_name, getattr(data, "shard_id", None)
        part = HEADS.get(part, part) if isinstance(part, str) else part
        if part is None or isinstance(part, int):
            yield held_name, part
    # Models whose loader knows the parts by itself
    for packed, parts in getattr(model, "packed_modules_mapping", {}).items():
        for index, part_name in enumerate(parts):
            if f".{part_name}." in mapped and len(parts) > 1:
                yield mapped.replace(f".{part_name}.", f".{packed}."), index
