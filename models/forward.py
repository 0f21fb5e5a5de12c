"""Arranges sequences of unequal lengths for a model, padded or packed in one row, and runs its body on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """B sequences in the form that a model takes.

    Padded: `input_ids` is (B, L), padded on the right. Under causal attention no real token sees the padding, so no
    attention mask is needed. Packed: (1, ΣL), with `position_ids` that restart at 0 at each sequence and the `borders`
    between sequences for variable-length attention.
    """

    input_ids: Tensor  # (B, L) or (1, ΣL)
    position_ids: Tensor  # (1, L) or (1, ΣL)
    borders: Tensor | None  # packed: (B + 1,) int32, 0 and the running sum of lengths; padded: None
    longest: int  # number of tokens in the longest sequence
    starts: NDArray[np.int64]  # (B,) where each sequence begins in the flattened ids


def lay_out(sequences: Sequence[NDArray[np.int32]], *, padded: bool, device: torch.device | str = "cpu") -> Layout:
    """Arrange sequences of token ids, (L,) each, in one rectangle or one row."""
    lengths = [len(ids) for ids in sequences]
    if padded:
        width = max(lengths)
        rows = np.zeros((len(sequences), width), dtype=np.int64)
        for row, ids in enumerate(sequences):
            rows[row, : len(ids)] = ids
        positions, starts = np.arange(width), np.arange(len(sequences)) * width
    else:
        rows = np.concatenate(sequences)[None].astype(np.int64)
        positions, starts = np.concatenate([np.arange(n) for n in lengths]), np.cumsum([0, *lengths[:-1]])
    return Layout(
        input_ids=torch.from_numpy(rows).to(device),
        position_ids=torch.from_numpy(positions[None]).to(device),
        borders=None if padded else torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(device),
        longest=max(lengths),
        starts=starts,
    )


def score_positions(layout: Layout, sequences: Sequence[NDArray[np.int32]], pad_token_id: int) -> Tensor:
    """(B,) positions at which the scores are read, in the flattened ids of `layout` and on their device.

    As in Hugging Face's own scalar heads this is the last token other than `pad_token_id`. That holds even if this token
    ends sequences for another reason, as many models pad with their end token. If there is no other token, it is the
    first one.
    """
    last = [int(np.flatnonzero(np.append(True, ids[1:] != pad_token_id))[-1]) for ids in sequences]
    return torch.from_numpy(layout.starts + np.array(last)).to(layout.input_ids.device)


def hidden_at(
    lm: Any, source: Tensor, input_ids: Tensor, position_ids: Tensor, borders: Tensor | None, longest: int
) -> Tensor:
    """(N, hidden): the last layer's states at the positions `source` of the flattened (B·L) ids.

    The other arguments are the fields of a `Layout`. With `borders` the model must have been loaded with
    `attention.NAME`; without them it must not.
    """
    packed = {} if borders is None else {"cu_seq_lens_q": borders, "max_length_q": longest}
    hidden: Tensor = lm.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, **packed
    ).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[source]
