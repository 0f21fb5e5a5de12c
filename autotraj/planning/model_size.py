"""How large a model is. Its parameters are counted in the model itself; the memory of a pass comes from formulas.

transformers builds the model from its `config.json` on the meta device, which allocates no memory. So every model that the
learners load can be planned, also a mixture of experts. Code that comes with a model is never run. Notation: b bytes for a
parameter (2 in bfloat16, 4 in float32), P parameters, T of them trained, N data-parallel and t tensor-parallel ranks.

Importing torch and transformers takes seconds, so they are imported only when a size is asked for.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from autotraj.errors import UserError
from learners.config import LoraConfig

KEPT = {4: 1.4, 2: 1.5}
"""What each block keeps until its backward pass, in `block_widths`, by bytes of a number. Measured with transformers' own
models on CPU, without weights: 1.35 in float32 and 1.45 in bfloat16 (whose norms compute in float32) for Qwen2."""
RECOMPUTED = 1.9
"""The same for a block that goes backward: its tensors, and their gradients at the same time (1.5 to 2.1)."""
WITHOUT_KEYS = {"linear_attention", "conv", "moe"}
"""Kinds of layers in transformers' `layer_types` (5.19) that keep no keys and values of each token. What they keep instead,
a state of fixed size for each sequence, isn't planned."""
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""The names that transformers' configurations give to the number of a layer's routed experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What is known of a causal language model before its weights are loaded."""

    num_parameters: int
    """P, without buffers; a tied output layer counts once."""
    num_output_layer: int
    """Parameters of an output layer of its own; 0: it is the input embedding."""
    block_widths: tuple[int, ...]
    """Numbers that each block makes of one token, attention fused (there is no L × L matrix): inputs and outputs of two
    norms (4h), and of each weight matrix the side that isn't h, after arXiv 2205.05198 §4: q and the attention's output, k,
    v, and gate, up and their product. Only the experts that a token uses count, with copies of their input and output
    (2h)."""
    hidden: int
    vocab_size: int
    max_positions: int | None
    num_kv_layers: int
    num_kv_heads: int
    kv_width: int
    """Numbers that one head keeps of a token: key and value, or the one compressed vector (arXiv 2405.04434 §2.1)."""

    def kv_bytes_per_token(self, element_bytes: int, tensor_parallel: int = 1) -> int:
        """Keys and values of one token on one of t GPUs: layers · KV heads / t · width · b; a head isn't split."""
        return self.num_kv_layers * max(1, self.num_kv_heads // tensor_parallel) * self.kv_width * element_bytes

    def activation_bytes_per_token(self, element_bytes: int, *, checkpointing: bool) -> int:
        """What is kept of one token for the backward pass (`KEPT`); with checkpointing, each block's input (h)."""
        if checkpointing:
            return element_bytes * len(self.block_widths) * self.hidden
        return int(KEPT[element_bytes] * element_bytes * sum(self.block_widths))

    def block_bytes_per_token(self, element_bytes: int, *, checkpointing: bool) -> int:
        """What one token takes besides, while the largest block goes backward (`RECOMPUTED`)."""
        share = RECOMPUTED if checkpointing else RECOMPUTED - KEPT[element_bytes]
        return int(share * element_bytes * max(self.block_widths))


_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
KNOWN: dict[str, dict[str, Any]] = {
    name: dict(zip(_SHAPE, shape, strict=True)) | {"head_dim": 128}
    for name, shape in {
        "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, True),
        "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, False),
        "qwen2.5-32b": ("qwen2", 5120, 27648, 64, 40, 8, 152064, 32768, False),
        "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, False),
    }.items()
}
"""The configurations of the models of examples/, for a plan made before they are downloaded; found by name in the path."""


def model_size(model: str) -> ModelSize:
    """The size of the checkpoint in directory `model`; without one, of the known model whose name the path holds.

    Raises UserError, with the remedy, for neither, and for an architecture that transformers doesn't know or can't build.
    """
    return _size(*_config_of(model))


def num_adapter_parameters(model: str, lora: LoraConfig) -> int:
    """T for the adapters that the learners would add to `model`. Raises UserError as `model_size`, or for a wrong target."""
    return _num_adapter_parameters(*_config_of(model), lora)


def _config_of(model: str) -> tuple[str, str]:
    """The place of the configuration of `model`, and its text."""
    path = Path(model) / "config.json"
    if path.is_file():
        with _explained(str(path)):
            return str(path), path.read_text()
    known = [name for name in KNOWN if name in model.lower().replace("_", "-")]
    if not known:
        raise UserError(
            f"model: there is no {path} to plan with, and {model!r} names none of {', '.join(KNOWN)}; download it first"
        )
    return known[0], json.dumps(KNOWN[known[0]])


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Raises as UserError whatever transformers and peft raise for a configuration: it may be of any type."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(f"model: {where} can't be planned with: {type(error).__name__}: {said[:300]}") from error


def _built(where: str, text: str) -> Any:
    """The causal language model of a configuration, on the meta device."""
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, __version__

    values = json.loads(text)
    kind = values["model_type"]
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model: {where} can't be planned with: transformers {__version__} has no causal language model of model_type "
            f"{kind!r}, and code that comes with a model is never run"
        )
    config = CONFIG_MAPPING[kind].from_dict(values)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)


@lru_cache
def _num_adapter_parameters(where: str, text: str, lora: LoraConfig) -> int:
    from learners.adapters import inject

    with _explained(where):
        lm = _built(where, text)
        inject(lm, lora)
        return int(lm.num_parameters(only_trainable=True))


@lru_cache
def _size(where: str, text: str) -> ModelSize:
    with _explained(where):
        lm = _built(where, text)
        config = lm.config.get_text_config()
        embedding, output = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        widths = _block_widths(lm, config, embedding.shape[1])
        heads = config.num_attention_heads
        compressed = getattr(config, "kv_lora_rank", None)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(widths)
        return ModelSize(
            num_parameters=lm.num_parameters(),
            num_output_layer=0 if output is embedding else output.numel(),
            block_widths=widths,
            hidden=embedding.shape[1],
            vocab_size=output.shape[0],
            max_positions=getattr(config, "max_position_embeddings", None),
            num_kv_layers=sum(kind not in WITHOUT_KEYS for kind in kinds),
            num_kv_heads=1 if compressed else getattr(config, "num_key_value_heads", None) or heads,
            kv_width=compressed + config.qk_rope_head_dim if compressed else 2 * head_dim,
        )


def _block_widths(lm: Any, config: Any, hidden: int) -> tuple[int, ...]:
    widths: Counter[int] = Counter()
    for name, parameter in lm.get_decoder().named_parameters():
        block = re.search(r"(?:^|\.)(\d+)\.", name)
        routed = ".experts." in name  # all experts of a layer are one tensor, or one matrix each
        if block is None or "bias" in name or parameter.dim() not in ((2, 3) if routed else (2,)):
            continue
        sides = parameter.shape[-2:]
        width = max(side for side in sides if side != hidden or set(sides) == {hidden})
        if routed:
            num_experts = next((n for key in NUM_EXPERTS if (n := getattr(config, key, None))), None)
            if not num_experts:
                raise ValueError(f"it has experts, but none of {', '.join(NUM_EXPERTS)}")
            num_at_work = parameter.numel() // sides.numel() * config.num_experts_per_tok / num_experts
            width = round(num_at_work * (width + hidden))
        widths[int(block[1])] += width
    if not widths:
        raise ValueError("its blocks aren't numbered")
    return tuple(4 * hidden + widths[number] for number in sorted(widths))
