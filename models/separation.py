"""Tests on random tokens, before any training, whether a loaded model keeps the sequences of one batch separate, and whether
several ranks can share a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import attention
from models.forward import hidden_at, lay_out
from models.sequence_parallel import WHOLE, Part, joined

LENGTHS = (11, 13)
FIRST = 4
"""Number of compared tokens of the second sequence. The sequence before has the largest effect on its first tokens."""
FROM_ALONE = {torch.float32: 3e-5, torch.bfloat16: 0.05}
"""Largest relative difference from a sequence alone that rounding may explain.

Measured on CPU with random models of 2 and 16 layers, weights of deviation 0.02 and 0.2, four seeds each. In float32,
models that keep sequences separate (Llama, Qwen2, Qwen3, Gemma, Gemma3, Mistral, Phi3, OLMo2, Granite, Mixtral,
Qwen3-MoE) differ by at most 1.1e-6, and those that don't (Qwen3.5, Qwen3-Next, LFM2, Falcon-H1, Bamba, Jamba) by 4e-4 to
1.4. In bfloat16, another way to compute attention (eager against SDPA; the packed kernel on a GPU is such a way, too)
makes 0.003 to 0.027, and at 64 layers up to 0.027 with the small weights and 0.08 with the large ones. With small
weights, models that mix sequences differ by only 0.003 to 0.4. So this comparison misses small effects, which
`FROM_OTHER` finds.
"""
FROM_OTHER = {torch.float32: 3e-5, torch.bfloat16: 2e-3}
"""The same limit when packed, between two runs in which only the tokens of the other sequence differ.

The same kernels compute both runs. In bfloat16 the models above that keep sequences separate differ by 0, and the others by
0.0033 to 1.5; in float32 the former by at most 3e-7, and the latter by 6e-4 to 1.5."""


TOKENWISE = {"full_attention", "sliding_attention"}
"""Types of layers that, except for attention, treat each token by itself. Others carry a state along the row. Of such a
layer the first rank's states are right, only its gradients are not."""


def fault(lm: Any, *, packed: bool) -> str | None:
    """Why `lm` must not get two sequences in one batch, packed or padded; None: it keeps them separate.

    Two sequences together must have the hidden states that each has alone, and the second's states must not change with
    the first's tokens. The reference is each sequence alone under the model's present attention. With `packed`, both are
    then run with `attention.NAME`, which stays enabled only if there is no fault.
    """
    if packed and "chunked_attention" in (getattr(lm.config.get_text_config(), "layer_types", None) or ()):
        return "packing knows no attention in chunks"
    generator = np.random.default_rng(0)
    size = lm.config.get_text_config().vocab_size
    one, other, second = (generator.integers(0, size, n).astype(np.int32) for n in (LENGTHS[0], *LENGTHS))
    present = lm.config._attn_implementation
    training = lm.training
    lm.eval()
    try:
        alone = _second(lm, [second], packed=False)
        if packed:
            lm.set_attn_implementation(attention.NAME)
        together, changed = (_second(lm, [first, second], packed=packed) for first in (one, other))
    except Exception as error:  # models raise different errors for arguments that they don't know
        found: str | None = f"its forward pass failed: {error!r}"
    else:
        found = _too_different(_difference(together, alone), FROM_ALONE[lm.dtype], "from those of a sequence alone")
        found = found or _too_different(
            _difference(together, changed),
            (FROM_OTHER if packed else FROM_ALONE)[lm.dtype],
            "with the tokens of the sequence before",
        )
    finally:
        lm.train(training)
    if found and packed:
        lm.set_attn_implementation(present)
    return found


@torch.no_grad()
def _second(lm: Any, sequences: list[NDArray[np.int32]], *, packed: bool) -> Tensor:
    """(FIRST, hidden): the states of the last sequence's first tokens."""
    layout = lay_out(sequences, padded=not packed, device=lm.device)
    source = torch.arange(FIRST, device=lm.device) + int(layout.starts[-1])
    return hidden_at(lm, source, layout.input_ids, layout.position_ids, layout.borders, layout.longest).float()


def sharing_fault(lm: Any, part: Part) -> str | None:
    """Why the ranks of `part.group` can't share the rows of `lm`, which has `attention.NAME`; None: their hidden states are
    those of one rank that has the whole row. Collective; all ranks find the same."""
    text = lm.config.get_text_config()
    if others := set(getattr(text, "layer_types", None) or ()) - TOKENWISE:
        return f"it has layers of the type {', '.join(sorted(others))}, which need the tokens of other ranks"
    if any(kind in repr(getattr(text, "rope_parameters", None)) for kind in ("dynamic", "longrope")):
        return "its rotary positions depend on the largest position, which differs among the ranks"
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, text.vocab_size, n).astype(np.int32) for n in LENGTHS]
    training = lm.training
    lm.eval()
    whole, shared = (_states(lm, sequences, each) for each in (WHOLE, part))
    lm.train(training)
    return _too_different(_difference(shared, whole), FROM_ALONE[lm.dtype], "from those of one rank")


@torch.no_grad()
def _states(lm: Any, sequences: list[NDArray[np.int32]], part: Part) -> Tensor:
    """(ΣL, hidden): the states of all tokens, on every rank."""
    layout = lay_out(sequences, padded=False, device=lm.device, part=part)
    share = layout.share_of(np.arange(sum(LENGTHS)))
    source = torch.arange(share.end - share.first, device=lm.device)
    ids, positions = layout.input_ids, layout.position_ids
    found = hidden_at(lm, source, ids, positions, layout.borders, layout.longest, part.group).float()
    return joined(found.T, share, part.group).T


def _difference(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


def _too_different(difference: float, limit: float, what: str) -> str | None:
    if difference <= limit:
        return None
    return f"hidden states differ by {difference:.2g} {what}; rounding explains {limit:g}"  # also for NaN
