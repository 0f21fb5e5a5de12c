"""The scalar head of a reward model: its padding token, its number type, and its forward pass.

Training and serving use the same functions, so both get the same score. It is also the score of Hugging Face's own
`AutoModelForSequenceClassification`. So a model that was trained elsewhere is served correctly here, and an exported one
there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from models.forward import hidden_at

HEAD = "score"
"""Hugging Face's name for the scalar head."""


def scores(
    lm: Any,
    source: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    borders: Tensor | None,
    longest: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(B,) float32 scores, read at the positions `source` (see `forward.score_positions`). Arguments as for `hidden_at`."""
    found: Tensor = lm.score(hidden_at(lm, source, input_ids, position_ids, borders, longest, group))
    return found[:, 0]


class _Float32Head(nn.Linear):
    """Computes in float32 whatever the weights' type. bfloat16 has 3 digits, too few for the differences of a pair's
    scores."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def use_float32_head(model: Any) -> None:
    """Make the scalar head of `model` compute in float32, in place. Raises ValueError if it has no linear head."""
    score = getattr(model, HEAD, None)
    if not isinstance(score, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear layer {HEAD!r}, which a reward model (head='scalar') needs"
        )
    head = _Float32Head(score.in_features, score.out_features, score.bias is not None, device="meta")
    head.weight, head.bias = score.weight, score.bias
    setattr(model, HEAD, head)


def padding_token(path: str, text_config: Any) -> int:
    """The padding token, which Hugging Face's scalar heads need: the model's, else the tokenizer's, else the end token."""
    candidates = [getattr(text_config, "pad_token_id", None)]
    if candidates == [None] and (not Path(path).exists() or (Path(path) / "tokenizer_config.json").exists()):
        candidates.append(AutoTokenizer.from_pretrained(path).pad_token_id)
    ends = getattr(text_config, "eos_token_id", None)
    candidates += ends if isinstance(ends, list) else [ends]
    found = next((token for token in candidates if token is not None), None)
    if found is None:
        raise ValueError(f"{path}: neither model nor tokenizer names a padding or end token; head='scalar' needs one")
    return int(found)
