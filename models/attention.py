"""Attention over concatenated sequences without padding, for any Hugging Face model that takes an attention interface.

Hugging Face's own way needs the flash-attn package, which takes hours to compile. PyTorch has the same kernel built in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from models.sequence_parallel import by_heads, by_tokens

NAME = "autotraj_varlen"


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. It needs no mask function, as the borders are enough."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


def use_sdpa(lm: Any) -> str | None:
    """Switch `lm`, loaded with "eager" attention, to PyTorch's fused attention; or return why it must keep its own."""
    if getattr(lm.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "PyTorch's fused attention would leave out the soft caps of its attention scores"
    if not lm._supports_sdpa:
        return "transformers has no fused attention for it"
    lm.set_attn_implementation("sdpa")
    return None


def is_available(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    windows: Iterable[int | None] = (None,),
) -> bool:
    """Whether this GPU has the kernel for such a model, tested on a few tokens, forward and backward, against SDPA.

    `windows`: those of its layers' attention. One that is longer than the test's sequences is tested as a short one."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    generator = torch.Generator(device).manual_seed(0)
    lengths = [5, 3]

    def random(heads: int) -> Tensor:
        return torch.randn(sum(lengths), heads, head_dim, device=device, dtype=dtype, generator=generator)

    query, key, value = leaves = [random(heads).requires_grad_() for heads in (num_heads, num_kv_heads, num_kv_heads)]
    borders = torch.tensor([0, 5, 8], device=device, dtype=torch.int32)
    for window in {None if window is None else min(window, 2) for window in windows}:
        outcomes = []
        for attend in (_fused, _by_sequence):
            try:
                out = attend(query, key, value, borders, max(lengths), head_dim**-0.5, window)
                outcomes.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
            except RuntimeError:  # the kernel wasn't built for this GPU or head size
                return False
        if not all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(*outcomes, strict=True)):
            return False
    return True


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: (1, heads, ΣL, head_dim) each → (1, ΣL, heads, head_dim).

    `sliding_window`: the number of tokens that a token sees, itself included; None: all before it. `sequence_group`: the
    ranks that each have a part of the row, in their order, while `cu_seq_lens_q` are the borders of the whole row."""
    assert attention_mask is None
    if softcap is not None or s_aux is not None:
        raise ValueError("attention over packed sequences knows no soft caps and no sinks")
    attend = _fused if query.is_cuda else _by_sequence
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if sequence_group is not None:
        q, k, v = (by_heads(x, sequence_group) for x in (q, k, v))
    out = attend(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    if sequence_group is not None:
        out = by_tokens(out, sequence_group)
    return out[None], None


def _fused(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 the kernel took fewer key heads than query heads without being asked.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # causal; the kernel doesn't count the token itself
        **grouped,
    )
    assert isinstance(out, Tensor)  # it is a tuple only if auxiliary outputs are requested
    return out


def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """The same by plain SDPA, one sequence at a time. CPUs use it, and the kernel is tested against it."""
    sizes = borders.diff().tolist()
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, ΣL, head_dim)
    parts = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if window is None else _within(window, q.shape[2], q.device),
            is_causal=window is None,
            scale=scale,
            enable_gqa=True,
        )
        for q, k, v in zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _within(window: int, length: int, device: torch.device) -> Tensor:
    """(length, length) bool: whether a token (row) sees another: itself and the `window` − 1 before it."""
    whole = torch.ones(length, length, dtype=torch.bool, device=device)
    return whole.tril().triu(1 - window)
