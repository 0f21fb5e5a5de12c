"""The changes that a repair made, word by word. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

MAX_TOKENS = 1500
"""Most tokens of each side; longer texts are shown without marks. `difflib` is at best quadratic on hostile text."""
MIN_SIMILARITY = 0.05
"""Below this similarity the two texts have so little in common that marks would not help."""

# A word or a single other character, with the white space before it, so that code changes show at their operators.
_TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text, and whether the other side lacks it."""

    text: str
    changed: bool


@dataclass(frozen=True, slots=True)
class Diff:
    """Both sides as pieces, complete and in order. `marked` is False if they weren't compared."""

    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    marked: bool


def compare(before: str, after: str) -> Diff:
    """The words of `before` that `after` lacks, and the reverse. A difference in white space alone doesn't count."""
    left, right = _TOKEN.findall(before), _TOKEN.findall(after)
    if max(len(left), len(right)) > MAX_TOKENS:
        return _unmarked(before, after)
    keys = [token.strip() for token in left], [token.strip() for token in right]
    same_left, same_right = [False] * len(left), [False] * len(right)
    # `autojunk` keeps the comparison fast for long texts of few different words.
    for i, j, size in SequenceMatcher(None, *keys).get_matching_blocks():
        same_left[i : i + size] = same_right[j : j + size] = [True] * size
    if left and right and 2 * sum(same_left) < MIN_SIMILARITY * (len(left) + len(right)):
        return _unmarked(before, after)
    return Diff(tuple(_pieces(left, same_left)), tuple(_pieces(right, same_right)), marked=True)


def _unmarked(before: str, after: str) -> Diff:
    return Diff((Piece(before, False),), (Piece(after, False),), marked=False)


def _pieces(tokens: Sequence[str], same: Sequence[bool]) -> Iterator[Piece]:
    runs = [(is_same, list(run)) for is_same, run in groupby(zip(tokens, same, strict=True), key=lambda pair: pair[1])]
    for is_same, run in runs:
        yield Piece("".join(token for token, _ in run), changed=not is_same)
