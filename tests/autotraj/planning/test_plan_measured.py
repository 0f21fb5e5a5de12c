"""The plan's formulas of a training pass against the tensors that live in one: the learner's own forward pass, on CPU."""

import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from autotraj.planning.memory import GIB, LOGITS, learner_memory
from autotraj.planning.model_size import ModelSize, model_size
from learners.batching import Sample
from learners.config import LearnerConfig, LoraConfig
from learners.engine import DeepSpeedEngine
from learners.model import TokenLogprobs

pytestmark = pytest.mark.slow

TOKENS, LAYERS = 512, 3
BYTES = {torch.float32: 4, torch.bfloat16: 2}


class LivingBytes(TorchDispatchMode):
    """The most that tensors made within it took at one time; views of what `model` holds aren't made. None: all
    tensors are made within it."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        parameters, buffers = ([], []) if model is None else (model.parameters(), model.buffers())
        held = [tensor for p in parameters for tensor in (p, p.grad) if tensor is not None]
        self._seen = {tensor.untyped_storage()._cdata for tensor in [*held, *buffers]}

    def forget_peak(self) -> None:
        self.peak = self._now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
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
    each = BYTES[dtype]
    kept = size.activation_bytes_per_token(each, checkpointing=checkpointing)
    planned = TOKENS * (kept + size.block_bytes_per_token(each, checkpointing=checkpointing))
    assert planned == pytest.approx(living.peak, rel=0.2)


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


VOCABULARY = 4096
TRAININGS: dict[str, dict[str, Any]] = {
    "float32": {"zero_stage": 0},
    "zero-1": {"dtype": "bfloat16", "zero_stage": 1},
    "zero-2-checkpointed": {"dtype": "bfloat16", "zero_stage": 2, "gradient_checkpointing": True},
    "zero-3": {"dtype": "bfloat16", "zero_stage": 3},
    "adapters": {"dtype": "bfloat16", "zero_stage": 2, "lora": LoraConfig()},
    "adapters-zero-3": {"zero_stage": 3, "lora": LoraConfig(), "dtype": "bfloat16", "gradient_checkpointing": True},
    "logits-in-blocks": {"dtype": "bfloat16", "zero_stage": 2, "logit_chunk_mib": 4},
    "few-tokens-zero-3": {"dtype": "bfloat16", "zero_stage": 3, "micro_batch_tokens": 128},
}


def write_model(folder: Path, *, tied: bool = False) -> None:
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def living_bytes(learner: LearnerConfig) -> tuple[int, int]:
    """The most that a rank of this learner takes while it starts, and in its second step: two micro-batches for each rank
    forward and backward, and the optimizer."""
    length = 128
    generator = np.random.default_rng(0)
    samples = [
        Sample(
            ids=generator.integers(0, VOCABULARY, length).astype(np.int32),
            prompt_len=1,
            mask=np.ones(length - 1, dtype=np.bool_),
            behaviour_logprobs=np.full(length - 1, -8.0, dtype=np.float32),
            advantage=(-1.0) ** number,
        )
        for number in range(2 * learner.num_learners * learner.micro_batch_tokens // length)
    ]
    with LivingBytes() as living:
        engine = DeepSpeedEngine(learner)
        starting = living.peak
        engine.policy_step(samples)  # the optimizer's state is made here
        living.forget_peak()
        engine.policy_step(samples)
    return starting, living.peak


def check_planned(learner: LearnerConfig, starting: int, step: int) -> None:
    memory = learner_memory(learner, model_size(learner.model))
    planned = memory.num_bytes - memory.parts["overhead"]
    assert planned == pytest.approx(step, rel=0.15), memory
    assert starting < 1.15 * planned


@pytest.mark.parametrize("name", list(TRAININGS))
def test_a_learner(name: str, tmp_path: Path) -> None:
    """A whole learner on one rank, with DeepSpeed's buffers."""
    write_model(tmp_path, tied=name == "logits-in-blocks")
    learner = LearnerConfig(model=str(tmp_path), **({"micro_batch_tokens": 1024} | TRAININGS[name]))
    check_planned(learner, *living_bytes(learner))


def of_all(learners: list[LearnerConfig]) -> list[tuple[int, int]]:
    return [living_bytes(learner) for learner in learners]


def test_two_ranks(tmp_path: Path) -> None:
    """What ZeRO shards is halved, also while it loads; what it gathers isn't."""
    write_model(tmp_path / "model")
    settings: dict[str, Any] = {"num_learners": 2, "micro_batch_tokens": 256, "dtype": "bfloat16"}
    learners = [LearnerConfig(model=str(tmp_path / "model"), zero_stage=stage, **settings) for stage in (2, 3)]
    for found in on_ranks(2, tmp_path / "ranks", of_all, learners):
        for learner, (starting, step) in zip(learners, found, strict=True):
            check_planned(learner, starting, step)


H100: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "0.5B": (
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        {},
        31.3,
    ),
    "3B": (
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
        | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        {"gradient_checkpointing": True},
        58.3,
    ),
    "7B": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "vocab_size": 152064},
        {"gradient_checkpointing": True, "lora": LoraConfig(rank=16)},
        23.5,
    ),
}
"""Qwen2.5 of that size → shape, settings, and GiB at the height of a step of 16,384 tokens on one H100 (docs/gpu.md)."""


@pytest.mark.parametrize("name", list(H100))
def test_what_an_h100_took(name: str, tmp_path: Path) -> None:
    shape, settings, measured = H100[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | shape))
    learner = LearnerConfig(model=str(tmp_path), num_gpus_per_learner=1, zero_stage=2, **settings)
    memory = learner_memory(learner, model_size(str(tmp_path)))
    planned = (memory.num_bytes - memory.parts["overhead"]) / GIB  # torch doesn't count the context
    assert planned == pytest.approx(measured, rel=0.1), memory
