"""Attention over concatenated sequences without padding, for any Hugging Face model that takes an attention interface.

Hugging Face's own way needs the flash-attn package, which is compiled for hours; PyTorch has the same kernel built in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "autotraj_varlen"


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. No mask function goes with it: borders say it all."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


def is_available(device: torch.device, dtype: torch.dtype, *, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether this GPU has the kernel for such a model: tried on a few tokens, forward and backward, against SDPA."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    generator = torch.Generator(device).manual_seed(0)
    lengths = [5, 3]

    def random(heads: int) -> Tensor:
        return torch.randn(sum(lengths), heads, head_dim, device=device, dtype=dtype, generator=generator)

    query, key, value = leaves = [random(heads).requires_grad_() for heads in (num_heads, num_kv_heads, num_kv_heads)]
    borders = torch.tensor([0, 5, 8], device=device, dtype=torch.int32)
    outcomes = []
    for attend in (_fused, _by_sequence):
        try:
            out = attend(query, key, value, borders, max(lengths), head_dim**-0.5)
            outcomes.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
        except RuntimeError:  # the kernel wasn't built for this GPU or head size
            return False
    return all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(*outcomes, strict=True))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: (1, heads, ΣL, head_dim) each → (1, ΣL, heads, head_dim)."""
    assert attention_mask is None
    if sliding_window is not None and sliding_window < max_length_q:
        raise ValueError(f"sequences of {max_length_q} tokens exceed the model's sliding window; set attention='sdpa'")
    attend = _fused if query.is_cuda else _by_sequence
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


def _fused(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are asked for
    return out


def _by_sequence(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float) -> Tensor:
    """The same by plain SDPA, one sequence at a time: for CPUs, and what the kernel is checked against."""
    sizes = borders.diff().tolist()
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, ΣL, head_dim)
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)
