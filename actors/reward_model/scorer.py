"""A reward model's forward pass: from token sequences to one number each. Plain torch and transformers, no Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from models import scalar
from models.forward import lay_out, score_positions
from models.load import load


class RewardScorer:
    """A loaded checkpoint: an `AutoModelForSequenceClassification` of a causal model with one label."""

    def __init__(self, path: str, *, on_gpu: bool) -> None:
        """Load the checkpoint in directory `path`. ValueError if it isn't a reward model, OSError if it can't be read."""
        self._device = torch.device("cuda" if on_gpu else "cpu")
        dtype = torch.bfloat16 if on_gpu else torch.float32
        loaded = load(path, head="scalar", dtype=dtype, device=self._device, local_files_only=True)
        if loaded.missing:
            # transformers fills them with random numbers and a warning: a policy's checkpoint would score noise.
            raise ValueError(
                f"{path} is not a trained reward model: it lacks {', '.join(loaded.missing[:3])}; "
                "give one that reward-model wrote"
            )
        self._model = model = loaded.model
        if model.config.num_labels != 1:
            raise ValueError(
                f"{path}: {type(model).__name__} with {model.config.num_labels} labels is not a reward model; "
                "it needs a causal model with num_labels = 1"
            )
        text_config = model.config.get_text_config()
        self._pad_token_id: int = text_config.pad_token_id
        self._vocab_size: int = text_config.vocab_size
        # None: a model without positions, such as Mamba, can read any number of tokens.
        self._max_tokens: int | None = getattr(text_config, "max_position_embeddings", None)

    def check(self, sequences: Sequence[NDArray[np.int32]]) -> None:
        """Raises ValueError for a sequence that the model can't read, which would end the process on a GPU."""
        for i, ids in enumerate(sequences):
            if len(ids) == 0 or (self._max_tokens is not None and len(ids) > self._max_tokens):
                most = "any number" if self._max_tokens is None else self._max_tokens
                raise ValueError(f"sequence {i} has {len(ids)} tokens; the reward model reads 1 to {most}")
            if ids.min() < 0 or ids.max() >= self._vocab_size:
                raise ValueError(
                    f"sequence {i} holds token ids from {ids.min()} to {ids.max()}; "
                    f"the reward model's vocabulary has {self._vocab_size}"
                )

    @torch.inference_mode()
    def score(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """Each sequence's score (N,), in one forward pass over a rectangle padded on the right."""
        layout = lay_out(sequences, padded=True, device=self._device)
        source = score_positions(layout, sequences, self._pad_token_id)
        values = scalar.scores(self._model, source, layout.input_ids, layout.position_ids, None, layout.longest)
        return np.asarray(values.cpu().numpy(), np.float32)
