"""Checksums of weights: by hand, over every way in which an engine splits them, and what they must tell apart."""

import struct

import pytest
import torch
from torch import Tensor

from models.checksums import HeldSums, Piece, PieceSum, checksum, merged, piece_of, signed

F32 = torch.float32
BF16 = torch.bfloat16


def by_hand(values: list[float]) -> int:
    """The same in Python's numbers."""
    total = 0
    for place, value in enumerate(values):
        (bits,) = struct.unpack("<i", struct.pack("<f", value))
        mixed = signed((bits + place * 0x1E3779B97F4A7C15) * 0x3F58476D1CE4E5B9)
        total += mixed ^ (mixed >> 29)
    return signed(total)


def whole(tensor: Tensor, dtype: torch.dtype = F32) -> int:
    return int(checksum(tensor, dtype))


def test_it_is_what_the_formula_says() -> None:
    assert by_hand([0.0]) == 0
    assert by_hand([1.0]) == signed(0x3F800000 * 0x3F58476D1CE4E5B9) ^ (signed(0x3F800000 * 0x3F58476D1CE4E5B9) >> 29)
    assert whole(torch.tensor([1.0, -2.5, 0.1])) == by_hand([1.0, -2.5, 0.1])
    matrix = torch.arange(6.0).reshape(2, 3) - 2.5
    assert whole(matrix) == by_hand(matrix.flatten().tolist())
    assert whole(matrix.reshape(2, 3, 1)) == whole(matrix)
    assert whole(torch.tensor(3.0)) == by_hand([3.0])
    assert whole(matrix.t()) == by_hand(matrix.t().flatten().tolist())


def test_blocks_make_no_difference() -> None:
    wide, high = torch.randn(2, 70_000), torch.randn(300, 500)
    assert whole(wide) == by_hand(wide.flatten().tolist())
    assert whole(high) == by_hand(high.flatten().tolist())


def test_values_count_as_the_engine_holds_them() -> None:
    exact = torch.randn(40, 7)
    rounded = exact.to(BF16)
    assert whole(exact, BF16) == whole(rounded, BF16) == whole(rounded.to(F32)) != whole(exact)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_must_show_shows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(64, 48).to(dtype)
    bits = torch.int16 if dtype is BF16 else torch.int32
    one, two, both_ways = tensor.clone(), tensor.clone(), tensor.clone()
    one.view(bits)[5, 6] += 1  # one entry by one unit in its last place
    two.view(bits)[5, 6] += 1
    two.view(bits)[50, 6] += 1
    both_ways.view(bits)[5, 6] += 1
    both_ways.view(bits)[50, 6] -= 1
    rows, columns = tensor.clone(), tensor.clone()
    rows[[3, 4]] = tensor[[4, 3]]
    columns[:, [3, 4]] = tensor[:, [4, 3]]
    found = [whole(t, dtype) for t in (tensor, one, two, both_ways, rows, columns, tensor.flip(0), torch.zeros(64, 48))]
    assert len(set(found)) == len(found)


def test_small_changes_in_two_entries_do_not_cancel() -> None:
    """As a small learning rate makes them in bfloat16. A plain sum of bits would miss each of these."""
    tensor = torch.randn(64, 64).to(BF16)
    pairs = torch.combinations(torch.arange(0, 4096, 64), 2)
    found = set()
    for up, down in pairs.tolist():
        changed = tensor.clone().flatten()
        changed.view(torch.int16)[up] += 1
        changed.view(torch.int16)[down] -= 1
        found.add(whole(changed.reshape(64, 64), BF16))
    assert len(found) == len(pairs)
    assert whole(tensor, BF16) not in found


def answers(tensor: Tensor, parts: list[Tensor]) -> HeldSums:
    """What ranks with these parts say of `tensor`."""
    ranks: list[dict[str, PieceSum | str]] = []
    for rank, part in enumerate(parts):
        piece = piece_of(tensor.shape, part.shape, rank, len(parts))
        ranks.append({"w": (piece.row, piece.column, part.numel(), int(checksum(part, F32, piece)))})
    return merged(ranks, {"w": tensor.shape})


def test_the_parts_of_ranks_add_up_to_the_whole() -> None:
    matrix, vector = torch.randn(8, 12), torch.randn(12)
    splits = {
        "rows": (matrix, list(matrix.chunk(4, 0))),  # column-parallel: q, gate, up
        "columns": (matrix, list(matrix.chunk(4, 1))),  # row-parallel: o, down
        "each has all": (matrix, [matrix] * 4),
        "two heads of keys on four ranks": (matrix, [matrix[:4], matrix[:4], matrix[4:], matrix[4:]]),
        "a bias": (vector, list(vector.chunk(4))),
        "a norm": (vector, [vector] * 4),
    }
    for how, (tensor, parts) in splits.items():
        assert answers(tensor, parts).sums == {"w": whole(tensor)}, how
    scale = torch.tensor(2.0)
    assert answers(scale, [scale, scale]).sums == {"w": whole(scale)}


def test_ranks_that_disagree_or_leave_entries_out_never_equal_the_whole() -> None:
    matrix = torch.randn(8, 12)
    assert answers(matrix, [matrix[4:], matrix[:4]]).sums != {"w": whole(matrix)}  # parts in the wrong order
    assert answers(matrix, [matrix, matrix, matrix + 1]).sums == {"w": None}
    lacking = merged([{"w": (0, 0, 90, 5)}], {"w": (8, 12)})
    assert lacking.sums == {"w": None}


def test_a_part_that_is_no_share_is_refused() -> None:
    for part in [(7, 12), (8, 5), (8,), (4, 6), (8, 24), (0, 12)]:
        with pytest.raises(ValueError, match=r"no even share of \(8, 12\)"):
            piece_of((8, 12), part, 0, 2)
    with pytest.raises(ValueError, match="3 ranks hold it"):
        piece_of((8, 12), (4, 12), 0, 3)
    assert piece_of((8, 12), (4, 12), 3, 4) == Piece(4, 0, 12)
    assert piece_of((8, 12), (8, 3), 3, 4) == Piece(0, 9, 12)


def test_what_a_rank_can_not_tell_is_told_by_name() -> None:
    held = merged([{"w": (0, 0, 96, 5), "b": "held as float8"}, {"w": (0, 0, 96, 5)}], {"w": (8, 12), "b": (12,)})
    assert held.sums == {"w": 5}
    assert held.unknown == {"b": "held as float8"}
    assert HeldSums.none(["w"], "no checksums").unknown == {"w": "no checksums"}
