"""Models other than a plain decoder, tiny and random: hybrids, whose state could cross borders, and mixtures of experts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_reference import plain_logprobs
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Qwen3_5TextConfig

from learners.config import LearnerConfig
from learners.engine import DeepSpeedEngine
from learners.weight_sync import host_update
from models import attention, separation

pytestmark = pytest.mark.usefixtures("single_rank")

SHAPE: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LINEAR = {f"linear_{name}": n for name, n in [("num_key_heads", 2), ("num_value_heads", 4), ("key_head_dim", 16)]}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}


def make(path: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer)
    model.save_pretrained(path)
    return path


def test_a_hybrid_model_that_would_mix_up_packed_sequences_is_padded(tmp_path: Path) -> None:
    path = make(tmp_path / "hybrid", Qwen3_5TextConfig(**SHAPE, **LINEAR, linear_value_head_dim=16))
    with pytest.raises(ValueError, match="attention='varlen' would mix up packed sequences"):
        DeepSpeedEngine(LearnerConfig(model=str(path), lr=1e-3, attention="varlen"))
    attention.register()
    lm = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")
    assert "differ" in (separation.fault(lm, packed=True) or "")
    assert separation.fault(lm, packed=False) is None
    engine = DeepSpeedEngine(LearnerConfig(model=str(path), lr=1e-3))
    ids = np.arange(3, 40, dtype=np.int32)
    np.testing.assert_allclose(engine.logprobs(ids), plain_logprobs(path, ids), atol=1e-4)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_routers_bias_is_exported_and_published(tmp_path: Path, zero_stage: int) -> None:
    path = make(tmp_path / "moe", Glm4MoeConfig(**SHAPE, **EXPERTS, n_group=2, topk_group=1))
    engine = DeepSpeedEngine(LearnerConfig(model=str(path), lr=1e-3, zero_stage=zero_stage))
    engine.export_hf(tmp_path / "exported")
    ids = np.arange(3, 60, dtype=np.int32)
    np.testing.assert_allclose(plain_logprobs(tmp_path / "exported", ids), engine.logprobs(ids), atol=1e-4)
    update = host_update(engine)
    assert update is not None
    assert sum(name.endswith("mlp.gate.e_score_correction_bias") for name in update.names) == 3
