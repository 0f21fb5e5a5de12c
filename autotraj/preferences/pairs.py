"""Preference pairs: read from their file, encoded as the reward model reads them, and split by question. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from learners.batching import Pair
from trajectory.chat import Tokenizer
from trajectory.records import check_preference, encode_conversation, preference_sides, read_jsonl
from trajectory.reward_input import joined


@dataclass(frozen=True, slots=True)
class PairSet:
    """Training and held-out pairs; no question is in both."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    num_too_long: int
    num_alike: int  # pairs that differ only in the tools' results, which are masked


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """How often the chosen side has the higher score, and by how much on average."""

    accuracy: float
    margin_mean: float


def load_pairs(
    path: Path, tokenizer: Tokenizer, *, margin: float, mask_results: bool, held_out: float, max_tokens: int
) -> PairSet:
    """The records of a `preferences.jsonl`, split by question. Raises ValueError, with the line, for another file."""
    train: list[Pair] = []
    kept_out: list[Pair] = []
    num_too_long = num_alike = 0
    for record in read_jsonl(path, ["chosen", "rejected"], check_preference):
        sides = [encode_side(tokenizer, side, mask_results=mask_results) for side in preference_sides(record)]
        pair = Pair(chosen=sides[0], rejected=sides[1], margin=margin)
        if len(pair) > max_tokens:
            num_too_long += 1
            continue
        if np.array_equal(pair.chosen, pair.rejected):
            num_alike += 1
            continue
        question = record.get("task_id") or json.dumps(record.get("messages", record.get("prompt")))
        (kept_out if is_held_out(str(question), held_out) else train).append(pair)
    return PairSet(tuple(train), tuple(kept_out), num_too_long, num_alike)


def encode_side(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], *, mask_results: bool) -> NDArray[np.int32]:
    """The tokens of a trajectory that the reward model reads: prompt and response, without the tools' if masked."""
    encoded = encode_conversation(tokenizer, messages)
    return joined(encoded.prompt_ids, encoded.response_ids, encoded.mask, mask_results=mask_results)


def is_held_out(task_id: str, share: float) -> bool:
    """Whether a question is held out. It depends on the question alone, so it stays the same when pairs are added."""
    digest = hashlib.sha256(f"held-out/{task_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def pair_accuracy(chosen: NDArray[np.float32], rejected: NDArray[np.float32]) -> PairAccuracy:
    """`chosen` and `rejected` are scores, (N,). A tie counts as half right."""
    gaps = np.asarray(chosen, np.float64) - rejected
    return PairAccuracy(float(np.mean((gaps > 0) + 0.5 * (gaps == 0))), float(gaps.mean()))
