"""Checks of a checkpoint folder, before an engine starts and before an engine takes new weights."""

from __future__ import annotations

import json
from pathlib import Path

from models.on_disk import tensor_shapes
from models.weight_update import WeightUpdate

OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Endings of the names of output layers."""


def refuse_tied_embeddings(model: str) -> None:
    """Raises ValueError if input and output embeddings are one tensor.

    vLLM packs linear weights for the CPU when it loads them. A reload packs the embedding again but leaves a tied `lm_head`
    with the old weights, without an error (vllm 0.32), so every logprob after a sync would be wrong by nats.
    """
    config = json.loads((Path(model) / "config.json").read_text())
    tied = (config.get("text_config") or {}).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is None:  # then the architecture's default holds; an output layer in the files means that it isn't tied
        tied = not any(name.endswith(OUTPUT_LAYERS) for name in tensor_shapes(model))
    if tied:
        raise ValueError(
            f"{model} ties lm_head to the input embedding, and vLLM on CPU can't take new weights for such "
            "a model. Untie it once: load it with transformers, set model.config.tie_word_embeddings = False, "
            "model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone()), and "
            "save_pretrained to another folder"
        )


def check_backend(update: WeightUpdate, backend: str) -> None:
    """Raises ValueError unless `update` uses `backend`."""
    if update.backend != backend:
        raise ValueError(f"the engine takes weights by {backend!r} (engine.weight_transfer), not by {update.backend!r}")


def check_update(update: WeightUpdate, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless `update` has every tensor of the checkpoint, each with its shape."""
    given = dict(zip(update.names, update.shapes, strict=True))
    if given.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        raise ValueError(
            f"policy version {update.policy_version} has other tensors than the engine's checkpoint: "
            f"missing {missing[:3]}, unknown {unknown[:3]} (first three of each)"
        )
    for name, shape in given.items():
        if tuple(shape) != expected[name]:
            raise ValueError(
                f"{name}: new weights of shape {tuple(shape)}, the engine's checkpoint has {expected[name]}"
            )
