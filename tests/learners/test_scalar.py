"""Reward-model training on one rank of DeepSpeed against plain transformers in float64."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_reference import plain_pair_training, plain_scores

from actors.reward_model.scorer import RewardScorer
from learners.batching import Pair, Sample
from learners.config import LearnerConfig, LoraConfig, LossConfig
from learners.engine import DeepSpeedEngine

pytestmark = [pytest.mark.usefixtures("single_rank"), pytest.mark.slow]

TINY_BASE = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "base"


def config(model: Path, **settings: Any) -> LearnerConfig:
    defaults = {"lr": 1e-2, "eps": 1e-3, "micro_batch_tokens": 150, "head": "scalar"}
    return LearnerConfig(model=str(model), **(defaults | settings))


def sides(pairs: list[Pair]) -> list[np.ndarray]:
    return [side for pair in pairs for side in (pair.chosen, pair.rejected)]


@pytest.mark.parametrize("settings", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}, {"attention": "varlen"}])
def test_pair_training_equals_plain_transformers(
    tiny_model: Path, pairs: list[Pair], tmp_path: Path, settings: dict[str, Any]
) -> None:
    engine = DeepSpeedEngine(config(tiny_model, **settings))
    engine.export_hf(tmp_path / "untrained")  # its head is random: the reference must start from the same one
    expected_weights, expected = plain_pair_training(tmp_path / "untrained", pairs, engine.config, num_steps=3)
    for theirs in expected:
        assert engine.pair_step(pairs) == pytest.approx(theirs | {"lr": 1e-2}, abs=1e-4)
    found = {name: tensor.clone() for name, tensor in engine.full_weights()}
    assert found.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_exported_model_scores_identically_and_can_be_trained_on(
    tiny_model: Path, pairs: list[Pair], tmp_path: Path, zero_stage: int
) -> None:
    sequences = [*sides(pairs), np.array([5, 6, 329, 329], np.int32), np.array([329], np.int32)]  # two end in padding
    engine = DeepSpeedEngine(config(tiny_model, zero_stage=zero_stage))
    before = engine.scores(sequences)
    accuracies = [engine.pair_step(pairs)["accuracy"] for _ in range(12)]
    assert accuracies[-1] == 1.0
    scores = engine.scores(sequences)
    assert (scores.dtype, scores.shape) == (np.float32, (16,))
    assert np.abs(scores - before).max() > 0.1
    np.testing.assert_array_equal(engine.scores(sequences[::-1]).round(4)[::-1], scores.round(4))  # in input order
    engine.export_hf(tmp_path / "exported")
    np.testing.assert_allclose(plain_scores(tmp_path / "exported", sequences), scores, atol=1e-5)
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForSequenceClassification"]
    assert written["pad_token_id"] == 329
    again = DeepSpeedEngine(config(tmp_path / "exported", zero_stage=zero_stage, attention="varlen"))
    np.testing.assert_allclose(again.scores(sequences), scores, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_training_and_serving_read_the_same_score_also_where_the_end_token_is_the_padding_one(
    tiny_model: Path, pairs: list[Pair], tmp_path: Path, attention: str
) -> None:
    """Token 7 ends sequences and pads them, as in models that name no padding token of their own."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    written = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(written | {"pad_token_id": None, "eos_token_id": 7}))
    endings = ([41, 7], [41, 7, 7], [7, 41], [7], [7, 7, 9], [12, 13, 14])
    sequences = [*sides(pairs), *(np.array(ids, np.int32) for ids in endings)]
    engine = DeepSpeedEngine(config(base, attention=attention))
    for _ in range(2):
        engine.pair_step(pairs)  # so that scores are far from 0
    engine.export_hf(tmp_path / "exported")
    trained = engine.scores(sequences)
    np.testing.assert_allclose(
        RewardScorer(str(tmp_path / "exported"), on_gpu=False).score(sequences), trained, atol=1e-5
    )
    np.testing.assert_allclose(plain_scores(tmp_path / "exported", sequences), trained, atol=1e-5)
    assert np.ptp(trained) > 0.1


def test_real_checkpoint_gets_a_head_its_tokenizer_and_padding(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    engine = DeepSpeedEngine(config(TINY_BASE, lora=LoraConfig(rank=4)))
    engine.export_hf(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    sequences = [np.array(tokenizer.encode(text), np.int32) for text in ("12 + 30 = 42", "no")]
    np.testing.assert_allclose(plain_scores(tmp_path / "exported", sequences), engine.scores(sequences), atol=1e-5)
    assert engine._module.lm.config.pad_token_id == tokenizer.pad_token_id


def test_scores_are_float32_also_of_a_bfloat16_model(tiny_model: Path, pairs: list[Pair], tmp_path: Path) -> None:
    engine = DeepSpeedEngine(config(tiny_model, dtype="bfloat16"))
    engine.pair_step(pairs)
    scores = engine.scores(sides(pairs))
    assert (scores != torch.from_numpy(scores).bfloat16().float().numpy()).any()
    engine.export_hf(tmp_path / "exported")
    np.testing.assert_allclose(plain_scores(tmp_path / "exported", sides(pairs), torch.bfloat16), scores, atol=0.05)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["all", "lora"])
def test_checkpoint_continues_as_if_never_stopped(
    tiny_model: Path, pairs: list[Pair], tmp_path: Path, zero_stage: int, lora: LoraConfig | None
) -> None:
    settings = config(tiny_model, zero_stage=zero_stage, lora=lora)
    engine = DeepSpeedEngine(settings)
    engine.pair_step(pairs)
    engine.save(tmp_path / "checkpoint")
    expected = engine.pair_step(pairs), engine.scores(sides(pairs)).tolist()
    resumed = DeepSpeedEngine(settings.model_copy(update={"seed": 5}))  # another random head, to be overwritten
    resumed.load(tmp_path / "checkpoint")
    assert (resumed.num_steps, resumed.policy_version) == (1, 0)
    assert (resumed.pair_step(pairs), resumed.scores(sides(pairs)).tolist()) == expected


def test_what_a_scalar_head_cannot_do_is_refused(tiny_model: Path, pairs: list[Pair], samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match=r"kl_coef=0.1 contradicts head='scalar'"):
        DeepSpeedEngine(config(tiny_model), LossConfig(kl_estimator="k2", kl_coef=0.1))
    engine = DeepSpeedEngine(config(tiny_model))
    for call in (engine.policy_step, engine.sft_step):
        with pytest.raises(ValueError, match=f"{call.__name__} needs head='lm'"):
            call(samples)
    with pytest.raises(ValueError, match="logprobs needs head='lm'"):
        engine.logprobs([1, 2])
    with pytest.raises(ValueError, match="pair 7: both sides are the same"):
        engine.pair_step([*pairs, Pair(chosen=pairs[0].chosen, rejected=pairs[0].chosen.copy())])
    with pytest.raises(ValueError, match="exceeds a micro-batch of 150; raise micro_batch_tokens"):
        engine.scores([np.zeros(151, np.int32)])
    language_model = DeepSpeedEngine(config(tiny_model, head="lm"))
    with pytest.raises(ValueError, match="pair_step needs head='scalar'"):
        language_model.pair_step(pairs)
    with pytest.raises(ValueError, match="scores needs head='scalar'"):
        language_model.scores(sides(pairs))
