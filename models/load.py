"""A model from a checkpoint folder, as training and serving need it: with a language model's head or a scalar one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from models import attention, scalar


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A Hugging Face model in evaluation mode, with PyTorch's fused attention where it can have it."""

    model: Any
    missing: tuple[str, ...]  # names of the weights that the checkpoint lacks: they are random
    plain: str | None  # why attention is computed by transformers' own code; None: it isn't


def load(
    path: str,
    *,
    head: Literal["lm", "scalar"],
    dtype: torch.dtype,
    device: torch.device,
    config: Any = None,
    local_files_only: bool = False,
) -> Loaded:
    """The model at `path` with Hugging Face's `config`, None: that of the checkpoint.

    A scalar head computes in float32, and its padding token is in the config. Raises ValueError if that can't be, OSError
    for what can't be read.
    """
    config = config or AutoConfig.from_pretrained(path, local_files_only=local_files_only)
    if head == "scalar":
        text_config = config.get_text_config()
        text_config.pad_token_id = scalar.padding_token(path, text_config)
    kind = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    model, report = kind.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=local_files_only,
        output_loading_info=True,
    )
    model = model.to(device)
    plain = attention.use_sdpa(model)
    if head == "scalar":
        scalar.use_float32_head(model)
    return Loaded(model=model, missing=tuple(sorted(report["missing_keys"])), plain=plain)
