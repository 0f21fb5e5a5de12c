"""The plan's formulas of a training pass against the tensors that live in one: the learner's own forward pass, on CPU."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from autotraj.planning.model_size import Architecture
from autotraj.planning.plan import LOGITS
from learners.model import TokenLogprobs

TOKENS, LAYERS = 512, 3
BYTES = {torch.float32: 4, torch.bfloat16: 2}


class LivingBytes(TorchDispatchMode):
    """The most that tensors made within it took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


def model(kind: str, dtype: torch.dtype, *, vocab_size: int, hidden: int, layers: int) -> tuple[Any, Architecture]:
    of = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    make_config, make_model = of[kind]
    config = make_config(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    lm = make_model(config).to(dtype).train()
    for parameter in lm.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as they are in training
    shape = Architecture(
        hidden=hidden,
        intermediate=4 * hidden,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=hidden // 4,
        vocab_size=vocab_size,
        tied=False,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        max_positions=1024,
    )
    return lm, shape


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", list(BYTES), ids=str)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_activations(kind: str, dtype: torch.dtype, checkpointing: bool) -> None:
    lm, shape = model(kind, dtype, vocab_size=16, hidden=256, layers=LAYERS)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros((4, TOKENS // 4), dtype=torch.long)
    with LivingBytes() as living:
        lm.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    planned = TOKENS * shape.activation_bytes_per_token(BYTES[dtype], checkpointing=checkpointing)
    assert planned == pytest.approx(living.peak, rel=0.25)


@pytest.mark.parametrize("num_chunks", [1, 8])
@pytest.mark.parametrize("trained", [True, False])
def test_logits(num_chunks: int, trained: bool) -> None:
    """Of a vocabulary beside which the one block is small."""
    lm, shape = model("qwen3", torch.float32, vocab_size=16_384, hidden=32, layers=1)
    if not trained:
        lm.lm_head.requires_grad_(False)
    chunk = 4 * shape.vocab_size * TOKENS // num_chunks
    learner = TokenLogprobs(lm, varlen=False, temperature=1.0, chunk_bytes=chunk)
    ids = torch.zeros((4, TOKENS // 4), dtype=torch.long)
    positions = torch.arange(TOKENS // 4).expand_as(ids)
    with LivingBytes() as living:
        logprobs, _ = learner(torch.arange(TOKENS), ids.flatten(), ids, positions, None, TOKENS // 4)
        logprobs.sum().backward()
    gradients = trained * (1 + (num_chunks > 1)) * 4 * shape.vocab_size * shape.hidden
    block = TOKENS * shape.activation_bytes_per_token(4, checkpointing=False)
    assert LOGITS * chunk + gradients + block == pytest.approx(living.peak, rel=0.15)
