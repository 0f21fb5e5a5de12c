"""Makes a Qwen3 model of a given size that computes the same as a small one: real shapes and costs, without a download.

The small model's numbers stand in the first places of the large one's matrices, and zeros in all others, so that hidden
sizes, heads and layers that are added change nothing. Three things are adapted. RMSNorm divides by the root of a mean over
more places, so its weights are smaller by the root of the ratio. The weights of the keys' norm also make up for the other
scale of scores in longer heads. A head's dimensions move to the places where the longer head rotates by the same angles.
The vocabulary stays the small model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SHAPES: dict[str, dict[str, int]] = {
    "5M": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
"""From Qwen3's published config.json files; `5M` is our own."""


def widen(source: str | Path, shape: str, target: Path, dtype: torch.dtype) -> int:
    """Writes a model of `SHAPES[shape]` to `target` that computes what the Qwen3 model at `source` does, with its tokenizer.

    Returns its number of parameters. `source` may not be larger than the shape in any place, and must have as many
    key-value heads as heads.
    """
    small = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    sizes = SHAPES[shape]
    config = AutoConfig.from_pretrained(source)
    for name, size in sizes.items():
        assert getattr(config, name) <= size, f"{source} has a larger {name} than {shape}"
        setattr(config, name, size)
    assert small.config.num_attention_heads == small.config.num_key_value_heads
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.rms_norm_eps = small.config.rms_norm_eps * small.config.hidden_size / config.hidden_size
    config.dtype = dtype
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config, dtype=dtype)
    large.to_empty(device="cpu")
    weights = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            parameter.zero_()
            if name in weights:
                place(name, weights[name], parameter, small.config, config)
    large.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return sum(parameter.numel() for parameter in large.parameters())


def place(name: str, small: Tensor, large: Tensor, before: Any, after: Any) -> None:
    """Copies the weight `name` into the zeros of the larger one. `before` and `after` are the two configurations."""
    head = rotary_places(before.head_dim, after.head_dim)
    group = after.num_attention_heads // after.num_key_value_heads
    queries = torch.cat([head + i * group * after.head_dim for i in range(before.num_attention_heads)])
    keys = torch.cat([head + i * after.head_dim for i in range(before.num_key_value_heads)])
    kind = name.split(".")[-2]
    if kind == "q_norm":
        large[head] = small.to(large.dtype)
    elif kind == "k_norm":
        large[head] = (small * (before.head_dim / after.head_dim) ** 0.5).to(large.dtype)
        # The norm of keys and that of queries each shrink by the root of the ratio, as of all norms; the scores' scale
        # 1 / sqrt(head_dim) shrinks by as much. Of the three factors one is left: this one.
    elif small.ndim == 1:
        large[: len(small)] = (small * (before.hidden_size / after.hidden_size) ** 0.5).to(large.dtype)
    elif kind == "o_proj":
        large[: small.shape[0], queries] = small.to(large.dtype)
    elif kind in ("q_proj", "k_proj", "v_proj"):
        large[queries if kind == "q_proj" else keys, : small.shape[1]] = small.to(large.dtype)
    else:
        large[: small.shape[0], : small.shape[1]] = small.to(large.dtype)


def rotary_places(before: int, after: int) -> Tensor:
    """[before] Where each dimension of a short head stands in a long one, so that RoPE rotates it by the same angle.

    Pair i of a head of d dimensions is (i, i + d/2) and rotates by base^(-2i/d) a position.
    """
    pairs = torch.arange(before // 2) * (after // before)
    return torch.cat([pairs, pairs + after // 2])
