"""The plan's formulas of a training pass against the tensors that live in one: the learner's own forward pass, on CPU."""

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from autotraj.planning.model_size import ModelSize, model_size
from autotraj.planning.plan import LOGITS
from learners.model import TokenLogprobs

pytestmark = pytest.mark.slow

TOKENS, LAYERS = 512, 3
BYTES = {torch.float32: 4, torch.bfloat16: 2}


class LivingBytes(TorchDispatchMode):
    """The most that tensors made within it took at one time; views of what `model` holds aren't made."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        held = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        self._seen = {tensor.untyped_storage()._cdata for tensor in [*held, *model.buffers()]}

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


SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 512}
KINDS: dict[str, Any] = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3-moe": partial(Qwen3MoeConfig, num_experts=8, **SPARSE),
    "deepseek-v3": partial(
        DeepseekV3Config,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=64,
        q_lora_rank=96,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=64,
        **SPARSE,
    ),
}


def model(
    kind: str, dtype: torch.dtype, folder: Path, *, vocab_size: int, hidden: int, layers: int
) -> tuple[Any, ModelSize]:
    config = KINDS[kind](
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4 if kind == "deepseek-v3" else 2,
        **({} if kind == "deepseek-v3" else {"head_dim": hidden // 4}),
        vocab_size=vocab_size,
        tie_word_embeddings=False,
        use_cache=False,
    )
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).train()
    for parameter in lm.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as they are in training
    config.save_pretrained(folder)
    return lm, model_size(str(folder))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", list(BYTES), ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_activations(kind: str, dtype: torch.dtype, checkpointing: bool, tmp_path: Path) -> None:
    lm, size = model(kind, dtype, tmp_path, vocab_size=16, hidden=256, layers=LAYERS)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros((4, TOKENS // 4), dtype=torch.long)
    with LivingBytes(lm) as living:
        lm.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    planned = TOKENS * size.activation_bytes_per_token(BYTES[dtype], checkpointing=checkpointing)
    assert planned == pytest.approx(living.peak, rel=0.25)


@pytest.mark.parametrize("num_chunks", [1, 8])
@pytest.mark.parametrize("trained", [True, False])
def test_logits(num_chunks: int, trained: bool, tmp_path: Path) -> None:
    """Of a vocabulary beside which the one block is small."""
    lm, size = model("qwen3", torch.float32, tmp_path, vocab_size=16_384, hidden=32, layers=1)
    if not trained:
        lm.lm_head.requires_grad_(False)
    chunk = 4 * size.vocab_size * TOKENS // num_chunks
    learner = TokenLogprobs(lm, varlen=False, temperature=1.0, chunk_bytes=chunk)
    ids = torch.zeros((4, TOKENS // 4), dtype=torch.long)
    positions = torch.arange(TOKENS // 4).expand_as(ids)
    with LivingBytes(lm) as living:
        logprobs, _ = learner(torch.arange(TOKENS), ids.flatten(), ids, positions, None, TOKENS // 4)
        logprobs.sum().backward()
    gradients = trained * (1 + (num_chunks > 1)) * 4 * size.vocab_size * size.hidden
    block = TOKENS * size.activation_bytes_per_token(4, checkpointing=False)
    assert LOGITS * chunk + gradients + block == pytest.approx(living.peak, rel=0.15)
