"""How much memory a dense decoder takes, from its shape alone: formulas, each with its source, no torch.

b bytes a parameter: 2 in bfloat16, 4 in float32. P parameters, T of them trained, N data-parallel ranks, t tensor-parallel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autotraj.errors import UserError

KEPT = 1.8
"""What each block keeps, in `block_bytes_per_token`. Of the tensors that live in transformers' own Qwen2 and Qwen3 on CPU:
1.7 (Qwen2) and 1.8 (Qwen3) in float32, 1.8 and 2.1 in bfloat16, whose norms compute in float32."""
RECOMPUTED = 3.1
"""The same of a block that is recomputed: its tensors and, while they live, their gradients (3.0 to 3.4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of a decoder of the Llama and Qwen kind."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool  # the output layer is the input embedding
    qkv_bias: bool  # Qwen2
    qk_norm: bool  # Qwen3
    max_positions: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear layers of one block, by name."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, i = self.hidden, self.intermediate
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def num_parameters(self) -> int:
        """P: embeddings, blocks with their norms and biases, the last norm, and the output layer if it has its own."""
        bias = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        block = sum(a * b for a, b in self.linears.values()) + bias + norms
        embeddings = self.vocab_size * self.hidden * (1 if self.tied else 2)
        return self.num_layers * block + self.hidden + embeddings

    def num_lora_parameters(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """T of adapters: rank · (in + out) for each linear layer of the blocks that is a target (arXiv 2106.09685).

        `targets`: `all-linear`, or ends of layers' names.
        """
        endings = tuple(self.linears) if isinstance(targets, str) else tuple(targets)
        return self.num_layers * sum(rank * (a + b) for name, (a, b) in self.linears.items() if name.endswith(endings))

    def kv_bytes_per_token(self, element_bytes: int, tensor_parallel: int = 1) -> int:
        """Keys and values of one token on one of t GPUs: 2 · layers · KV heads / t · head size · b; a head isn't split."""
        return 2 * self.num_layers * max(1, self.num_kv_heads // tensor_parallel) * self.head_dim * element_bytes

    def block_bytes_per_token(self, element_bytes: int) -> int:
        """One token's tensors in one block, attention fused (there is no L × L matrix): inputs and outputs of two norms
        (4h), q and the attention's output, k, v, and gate, up and their product (3i), after arXiv 2205.05198 §4."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return element_bytes * (4 * self.hidden + 2 * q + 2 * kv + 3 * self.intermediate)

    def activation_bytes_per_token(self, element_bytes: int, *, checkpointing: bool) -> int:
        """What one token takes at the height of a training pass, measured in blocks (`KEPT`, `RECOMPUTED`). With
        checkpointing each block keeps its input (h), and one block at a time is recomputed."""
        block = self.block_bytes_per_token(element_bytes)
        if checkpointing:
            return self.num_layers * self.hidden * element_bytes + int(RECOMPUTED * block)
        return int(self.num_layers * KEPT * block)


KNOWN: dict[str, Architecture] = {
    "qwen2.5-3b": Architecture(
        hidden=2048,
        intermediate=11008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        vocab_size=151936,
        tied=True,
        head_dim=128,
        qkv_bias=True,
        qk_norm=False,
        max_positions=32768,
    ),
    "qwen2.5-7b": Architecture(
        hidden=3584,
        intermediate=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        vocab_size=152064,
        tied=False,
        head_dim=128,
        qkv_bias=True,
        qk_norm=False,
        max_positions=32768,
    ),
    "qwen2.5-32b": Architecture(
        hidden=5120,
        intermediate=27648,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        vocab_size=152064,
        tied=False,
        head_dim=128,
        qkv_bias=True,
        qk_norm=False,
        max_positions=32768,
    ),
    "qwen3-8b": Architecture(
        hidden=4096,
        intermediate=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=151936,
        tied=False,
        head_dim=128,
        qkv_bias=False,
        qk_norm=True,
        max_positions=40960,
    ),
}
"""The models of examples/, for a plan made before they are downloaded; found by their name in the path."""


def architecture(model: str) -> Architecture:
    """The shape of the checkpoint in directory `model`; without one, of the known model whose name the path holds.

    Raises UserError, with the remedy, for neither, and for a model that isn't a dense decoder.
    """
    path = Path(model) / "config.json"
    if path.is_file():
        try:
            return _read(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"model: {path} can't be planned with: {error!r}; only dense decoders are known") from error
    known = [name for name in KNOWN if name in model.lower().replace("_", "-")]
    if not known:
        raise UserError(
            f"model: there is no {path} to plan with, and {model!r} names none of {', '.join(KNOWN)}; download it first"
        )
    return KNOWN[known[0]]


def _read(config: dict[str, object]) -> Architecture:
    def number(name: str, default: int | None = None) -> int:
        value = config.get(name, default) or default
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"{name} is {value!r}")
        return value

    if experts := {"num_experts", "num_local_experts", "n_routed_experts"} & config.keys():
        raise ValueError(f"it has {experts.pop()}: a mixture of experts")
    heads = number("num_attention_heads")
    return Architecture(
        hidden=number("hidden_size"),
        intermediate=number("intermediate_size"),
        num_layers=number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", number("hidden_size") // heads),
        vocab_size=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=config.get("model_type") == "qwen2" or bool(config.get("attention_bias", False)),
        qk_norm=config.get("model_type") == "qwen3",
        max_positions=number("max_position_embeddings"),
    )
