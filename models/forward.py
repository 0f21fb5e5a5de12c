"""Arranges sequences of unequal lengths for a model, padded or packed in one row, and runs its body on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from models.sequence_parallel import WHOLE, Part, Share


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """B sequences in the form that a model takes.

    Padded: `input_ids` is (B, L), padded on the right. Under causal attention no real token sees the padding, so no
    attention mask is needed. Packed: (1, ΣL), with `position_ids` that restart at 0 at each sequence and the `borders`
    between sequences for variable-length attention. A rank may have only one of several equal parts of the row; the other
    fields are those of the whole row all the same. The last sequence is then padded so that the parts are equal.
    """

    input_ids: Tensor  # (B, L), or (1, ΣL / parts)
    position_ids: Tensor  # (1, L), or (1, ΣL / parts)
    borders: Tensor | None  # packed: (B + 1,) int32, 0 and the running sum of lengths; padded: None
    longest: int  # number of tokens in the longest sequence
    starts: NDArray[np.int64]  # (B,) where each sequence begins in the flattened ids
    first: int  # where the part begins in the flattened ids

    def share_of(self, positions: NDArray[np.int64]) -> Share:
        """Which of `positions` in the flattened ids, in ascending order, are in this part."""
        first, end = np.searchsorted(positions, (self.first, self.first + self.input_ids.numel()))
        return Share(first=int(first), end=int(end), total=len(positions))


def lay_out(
    sequences: Sequence[NDArray[np.int32]], *, padded: bool, device: torch.device | str = "cpu", part: Part = WHOLE
) -> Layout:
    """Arrange sequences of token ids, (L,) each, in one rectangle, or in one row of which `part` is kept."""
    assert part.count == 1 or not padded
    if part.count > 1:
        missing = -sum(len(ids) for ids in sequences) % part.count
        # Under causal attention no real token sees this padding.
        sequences = [*sequences[:-1], np.pad(sequences[-1], (0, missing))]
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
    width = rows.shape[1] // part.count
    first = part.index * width
    return Layout(
        input_ids=torch.from_numpy(rows[:, first : first + width]).to(device),
        position_ids=torch.from_numpy(positions[None, first : first + width]).to(device),
        borders=None if padded else torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(device),
        longest=max(lengths),
        starts=starts,
        first=first,
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
    lm: Any,
    source: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    borders: Tensor | None,
    longest: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(N, hidden): the last layer's states at the positions `source` of the flattened (B·L) ids.

    The other arguments are the fields of a `Layout`. With `borders` the model must have been loaded with
    `attention.NAME`; without them it must not. With `group`, the ranks that have the parts of the layout's row, this is
    collective, and `source` counts from the beginning of this rank's part.
    """
    packed: dict[str, Any] = {} if borders is None else {"cu_seq_lens_q": borders, "max_length_q": longest}
    if group is not None:
        packed["sequence_group"] = group
    hidden: Tensor = lm.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, **packed
    ).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[source]
