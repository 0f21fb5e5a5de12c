"""Runs a Hugging Face model's body, without its head, on one layout of sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def hidden_at(
    lm: Any, source: Tensor, input_ids: Tensor, position_ids: Tensor, borders: Tensor | None, longest: int
) -> Tensor:
    """(N, hidden): the last layer's states at the positions `source` of the flattened (B·L) ids.

    The other arguments are the fields of a `layout.Layout`. With `borders` the model must have been loaded with
    `attention.NAME`; without them it must not.
    """
    packed = {} if borders is None else {"cu_seq_lens_q": borders, "max_length_q": longest}
    hidden: Tensor = lm.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, **packed
    ).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[source]
