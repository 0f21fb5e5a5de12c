"""Whether a loaded model keeps the sequences of one batch apart: tried on random tokens, before anything is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import attention
from models.forward import hidden_at
from models.layout import lay_out

LENGTHS = (11, 13)
FIRST = 4
"""Tokens of the second sequence that are compared: what came before it changes these most."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest relative difference of a hidden state that rounding may explain."""


def fault(lm: Any, *, packed: bool) -> str | None:
    """Why `lm` must not be given two sequences in one batch, packed or padded; None: it keeps them apart.

    Two sequences together must have the hidden states that each has alone, and the second's must not change with the
    first's tokens. The reference is each alone under the model's present attention; with `packed`, the two are then run
    with `attention.NAME`, which is left switched on only if there is no fault.
    """
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
    except Exception as error:  # models raise what they like at arguments that they don't know
        found: str | None = f"its forward pass failed: {error!r}"
    else:
        differences = [_difference(together, alone), _difference(together, changed)]
        limit = TOLERANCE.get(lm.dtype, 0.05)
        found = None
        if not max(differences) <= limit:
            most = max(differences)
            found = f"hidden states differ by {most:.2g} from those of a sequence alone; rounding explains {limit}"
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


def _difference(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())
