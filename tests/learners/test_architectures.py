"""Models other than a plain decoder, tiny and random: hybrids, whose state could cross borders, and mixtures of experts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_reference import plain_logprobs
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

from learners import published
from learners.batching import Sample
from learners.config import LearnerConfig
from learners.engine import DeepSpeedEngine
from learners.weight_sync import HostMemory, host_update, nccl_update
from models import attention, separation

pytestmark = [pytest.mark.usefixtures("single_rank"), pytest.mark.slow]

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
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {f"linear_{name}": n for name, n in [("num_key_heads", 2), ("num_value_heads", 4), ("key_head_dim", 16)]}
WITHOUT_HEAD_DIM = {name: value for name, value in SHAPE.items() if name != "head_dim"}
ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED: dict[str, Any] = {**ROUTED, "shared_expert_intermediate_size": 32}
LATENT: dict[str, Any] = {
    **WITHOUT_HEAD_DIM,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
SINKS: dict[str, Any] = {
    **SHAPE,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2-moe": lambda: Qwen2MoeConfig(**WITHOUT_HEAD_DIM, **SHARED),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SHAPE, **ROUTED),
    "qwen3.5-moe": lambda: Qwen3_5MoeTextConfig(**SHAPE, **SHARED, **LINEAR, linear_value_head_dim=16),
    "olmoe": lambda: OlmoeConfig(**WITHOUT_HEAD_DIM, num_experts=4, num_experts_per_tok=2),
    "deepseek-v2": lambda: DeepseekV2Config(**LATENT, q_lora_rank=None),
    "deepseek-v3": lambda: DeepseekV3Config(**LATENT, q_lora_rank=16, n_group=2, topk_group=1),
    "glm4-moe": lambda: Glm4MoeConfig(**SHAPE, **EXPERTS, n_group=2, topk_group=1),
    "gpt-oss": lambda: GptOssConfig(**SINKS),
}
WINDOW = 8
WINDOWED = {
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, sliding_window=WINDOW),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(
        **WITHOUT_HEAD_DIM, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
}
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
    update = host_update(engine, HostMemory())
    assert update is not None
    assert_as_on_disk(path, engine)
    assert sum(name.endswith("mlp.gate.e_score_correction_bias") for name in update.names) == 3


def assert_as_on_disk(path: Path, engine: DeepSpeedEngine) -> None:
    """Published weights are, name by name, those of the checkpoint, by either backend."""
    held = load_file(path / "model.safetensors")
    engine.check_published()
    update, announced = host_update(engine, HostMemory()), nccl_update(engine)
    assert update is not None
    assert dict(zip(update.names, update.shapes, strict=True)) == {n: tuple(t.shape) for n, t in held.items()}
    assert (announced.names, announced.shapes, announced.dtypes) == (update.names, update.shapes, update.dtypes)
    for name, (array, _) in update.payload.items():
        np.testing.assert_array_equal(array, held[name].numpy(), err_msg=name)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_published_and_exported_as_its_checkpoint_has_it(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path / "moe", MIXTURES[kind]())
    engine = DeepSpeedEngine(LearnerConfig(model=str(path), lr=1e-3))
    assert_as_on_disk(path, engine)
    engine.export_hf(tmp_path / "exported")
    ids = np.arange(3, 60, dtype=np.int32)
    np.testing.assert_allclose(plain_logprobs(tmp_path / "exported", ids), engine.logprobs(ids), atol=1e-4)


def test_a_checkpoint_with_other_tensors_than_training_has_is_refused_with_their_names(tmp_path: Path) -> None:
    path = make(tmp_path / "moe", MIXTURES["qwen3-moe"]())
    held = load_file(path / "model.safetensors")
    more = {f"mtp.layers.0.{name}.weight": torch.zeros(2) for name in ("a", "b", "c", "d")}
    save_file({**held, **more}, path / "model.safetensors", metadata={"format": "pt"})
    engine = DeepSpeedEngine(LearnerConfig(model=str(path), lr=1e-3))
    for check in (engine.check_published, lambda: published.check_folder(str(path))):
        with pytest.raises(ValueError, match=r"training doesn't have: mtp.layers.0.a.weight, .* and 1 more\)"):
            check()


@pytest.mark.parametrize("kind", MIXTURES | WINDOWED)
def test_what_can_be_published_is_known_before_a_weight_is_read(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path / "model", (MIXTURES | WINDOWED)[kind]())
    published.check_folder(str(path))
    held = load_file(path / "model.safetensors")
    del held["model.norm.weight"]
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"training has tensors that the checkpoint lacks: model.norm.weight"):
        published.check_folder(str(path))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "model", MIXTURES["gpt-oss"]())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ValueError, match=r"weights are quantized \(mxfp4\).* use a copy in bfloat16"):
        DeepSpeedEngine(LearnerConfig(model=str(path), lr=1e-3))


@pytest.mark.parametrize("kind", WINDOWED)
def test_packed_sequences_longer_than_a_sliding_window_are_as_alone(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path / kind, WINDOWED[kind]())
    packed, padded = (
        DeepSpeedEngine(LearnerConfig(model=str(path), lr=1e-3, attention=way)) for way in ("varlen", "sdpa")
    )
    ids = np.arange(3, 60, dtype=np.int32)
    assert len(ids) > 4 * WINDOW
    expected = plain_logprobs(path, ids)
    np.testing.assert_allclose(packed.logprobs(ids), expected, atol=1e-4)
    samples = [Sample(ids=ids, prompt_len=5, mask=np.ones(len(ids) - 5, dtype=np.bool_))] * 3
    assert packed.sft_step(samples)["loss"] == pytest.approx(padded.sft_step(samples)["loss"], abs=1e-5)
    np.testing.assert_allclose(packed.logprobs(ids), padded.logprobs(ids), atol=1e-3)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda: GptOssConfig(**SINKS), "transformers has no fused attention"),
        (lambda: Gemma2Config(**SHAPE, sliding_window=16, final_logit_softcapping=None), "soft caps"),
    ],
    ids=["sinks", "soft caps"],
)
def test_attention_that_sdpa_has_not_is_computed_by_transformers_own_code(
    tmp_path: Path, config: Any, why: str
) -> None:
    path = make(tmp_path / "model", config())
    for way in ("sdpa", "varlen"):
        with pytest.raises(ValueError, match=f"attention='{way}' isn't available for .*{why}"):
            DeepSpeedEngine(LearnerConfig(model=str(path), lr=1e-3, attention=way))
    engine = DeepSpeedEngine(LearnerConfig(model=str(path), lr=1e-3))
    assert [note for note in engine.notes if why in note]
    ids = np.arange(3, 60, dtype=np.int32)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logprobs = plain(torch.from_numpy(ids)[None].long()).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.from_numpy(ids[1:])[:, None].long())[:, 0].numpy()
    np.testing.assert_allclose(engine.logprobs(ids), expected, atol=1e-4)


def test_a_small_leak_is_seen_in_bfloat16(tmp_path: Path) -> None:
    """Its weights are of deviation 0.02: what crosses the border is less than bfloat16's rounding of the whole."""
    small = WITHOUT_HEAD_DIM | {"initializer_range": 0.02, "num_hidden_layers": 2}
    path = make(tmp_path / "conv", Lfm2Config(**small, layer_types=["conv", "full_attention"]))
    attention.register()
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa")
    assert "with the tokens of the sequence before" in (separation.fault(lm, packed=True) or "")
    plain = make(tmp_path / "plain", MistralConfig(**SHAPE | {"initializer_range": 0.02}))
    lm = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, attn_implementation="sdpa")
    assert separation.fault(lm, packed=True) is None


def test_attention_in_chunks_is_not_packed(tmp_path: Path) -> None:
    """Chunks are longer than the trial's sequences: it couldn't see them."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    path = make(tmp_path / "chunked", Llama4TextConfig(**SHAPE | experts, attention_chunk_size=64))
    attention.register()
    lm = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")
    assert separation.fault(lm, packed=True) == "packing knows no attention in chunks"
