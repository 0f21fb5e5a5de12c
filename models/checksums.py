"""Checksums of weights, to compare what learners published with what an engine holds, tensor by tensor, bit by bit.

A tensor's checksum is a sum over its entries, so it can be computed piece by piece wherever the pieces are: an engine holds
q, k and v in one parameter and, with tensor parallelism, a part of each on every rank. Each entry's summand mixes its value
with its place in the whole tensor, so a changed entry and two exchanged entries both show. Values count as they are in the
engine's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WeightsDtype = Literal["float32", "bfloat16", "float16"]

PLACE_FACTOR = 0x1E3779B97F4A7C15
VALUE_FACTOR = 0x3F58476D1CE4E5B9
"""Odd 61-bit and 62-bit numbers, whose products fill all 64 bits. The second is splitmix64's."""
SHIFT = 29
BLOCK_ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 23}
"""Entries summed at a time. An entry takes about 24 bytes meanwhile: on a CPU a block stays in its cache."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a piece lies in a whole tensor, seen as a matrix: its first row and column, and the matrix's width."""

    row: int
    column: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksums:
    """The checksums of one published set of weights."""

    policy_version: int
    dtype: WeightsDtype  # to which the entries were rounded first: the engine's
    sums: Mapping[str, int]  # published name → checksum
    changed_share: float | None = None  # of all entries, since the publication before; None: there was none


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSums:
    """The checksums of what an engine holds, by published names, and for each name that it can't tell one of the reason."""

    sums: Mapping[str, int | None]  # None: its ranks hold different copies of a piece, or not all pieces
    unknown: Mapping[str, str]

    @classmethod
    def none(cls, names: Sequence[str], reason: str) -> HeldSums:
        """The answer of an engine that can't compute checksums, because of `reason`."""
        return cls(sums={}, unknown=dict.fromkeys(names, reason))


PieceSum = tuple[int, int, int, int]
"""Row and column of a piece, its number of entries, its checksum."""


def checksum(tensor: Tensor, dtype: torch.dtype, piece: Piece | None = None) -> Tensor:
    """The checksum, modulo 2**64 as a signed number: a scalar int64 tensor on the same device, so that nobody waits for it.

    `tensor` is the part of a whole tensor that begins at `piece`; None: it is whole."""
    matrix = as_matrix(tensor.detach())
    rows, columns = matrix.shape
    piece = piece or Piece(0, 0, columns)
    block = BLOCK_ENTRIES.get(tensor.device.type, BLOCK_ENTRIES["cuda"])
    wide = max(1, min(columns, block))
    high = max(1, block // wide)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            total += _block_sum(
                matrix[top : top + high, left : left + wide].to(dtype),
                piece.row + top,
                piece.column + left,
                piece.width,
            )
    return total


def as_matrix(tensor: Tensor) -> Tensor:
    """A vector as one row; all dimensions after the first as columns."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(tensor.shape[0], -1)


def _block_sum(block: Tensor, row: int, column: int, width: int) -> Tensor:
    def places(start: int, number: int, stride: int) -> Tensor:
        return torch.arange(start, start + number, device=block.device).mul_(stride).mul_(PLACE_FACTOR)

    mixed = block.to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
    mixed += places(row, block.shape[0], width)[:, None]
    mixed += places(column, block.shape[1], 1)[None, :]
    mixed *= VALUE_FACTOR
    mixed ^= mixed >> SHIFT  # without this, changes of +1 and −1 in two entries would cancel in the sum
    return mixed.sum()


def piece_of(whole: Sequence[int], part: Sequence[int], rank: int, size: int) -> Piece:
    """Where the part of a whole tensor lies that `rank` of `size` ranks holds. If there are more ranks than parts, as for
    the heads of keys and values, neighbours hold the same part.

    Raises ValueError if the part is no even share of a row or column dimension."""
    width = math.prod(whole[1:] if len(whole) > 1 else whole)
    if tuple(whole) == tuple(part):
        return Piece(0, 0, width)
    cut = [i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b]
    if len(whole) == len(part) <= 2 and len(cut) == 1 and part[cut[0]]:
        parts, rest = divmod(whole[cut[0]], part[cut[0]])
        if parts and not rest and size % parts == 0:
            offset = rank // (size // parts) * part[cut[0]]
            return Piece(offset, 0, width) if cut[0] == 0 and len(whole) == 2 else Piece(0, offset, width)
    raise ValueError(f"{size} ranks hold it as {tuple(part)} each, which is no even share of {tuple(whole)}")


def merged(ranks: Sequence[Mapping[str, PieceSum | str]], shapes: Mapping[str, Sequence[int]]) -> HeldSums:
    """What an engine holds, from its ranks' pieces (or the reasons why a rank has none). A piece that several ranks hold
    counts once."""
    sums: dict[str, int | None] = {}
    unknown: dict[str, str] = {}
    for name, shape in shapes.items():
        answers = [rank.get(name, "a rank of the engine doesn't know it") for rank in ranks]
        pieces = {answer for answer in answers if not isinstance(answer, str)}
        if reasons := [answer for answer in answers if isinstance(answer, str)]:
            unknown[name] = reasons[0]
        elif sum(count for *_, count, _ in pieces) == math.prod(shape):
            sums[name] = signed(sum(value for *_, value in pieces))
        else:
            sums[name] = None
    return HeldSums(sums=sums, unknown=unknown)


def signed(number: int) -> int:
    """`number` modulo 2**64, as int64 has it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
