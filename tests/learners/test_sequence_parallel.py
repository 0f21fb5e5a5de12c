"""Ranks that share micro-batches against one rank that has them whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from learners.batching import Pair, Sample
from learners.config import LearnerConfig, LoraConfig, LossConfig
from learners.engine import DeepSpeedEngine
from learners.model import load_model
from models.separation import sharing_fault
from models.sequence_parallel import WHOLE

pytestmark = [pytest.mark.usefixtures("single_rank"), pytest.mark.slow]

VOCAB = 330  # of the tiny model, too

LOSS = LossConfig(algorithm="gspo", is_max=1.5, kl_estimator="k3", kl_coef=0.1)
"""It needs all tokens of a sequence at once, and logprobs of the reference."""


def config(model: Path, **settings: Any) -> LearnerConfig:
    """With `lr` and `eps` of 1 a step moves a weight by g / (1 + |g|): the weights after it show the gradient."""
    defaults = {"lr": 1.0, "eps": 1.0, "max_grad_norm": 0.0, "micro_batch_tokens": 128, "attention": "varlen"}
    return LearnerConfig(model=str(model), **(defaults | settings))


def shared(whole: LearnerConfig, num_learners: int, size: int) -> LearnerConfig:
    """The same with micro-batches of the same tokens, which `size` ranks share."""
    settings = {
        "num_learners": num_learners,
        "sequence_parallel_size": size,
        "micro_batch_tokens": whole.micro_batch_tokens // size,
        "attention": "auto",
    }
    return LearnerConfig(**(whole.model_dump() | settings))


def train(settings: list[LearnerConfig], samples: list[Sample], pairs: list[Pair]) -> list[dict[str, Any]]:
    """For each settings the figures of two steps and the weights after each; then scores or logprobs."""
    found = []
    for each in settings:
        scalar = each.head == "scalar"
        engine = DeepSpeedEngine(each, None if scalar else LOSS)
        steps = []
        for _ in range(2):
            metrics = engine.pair_step(pairs) if scalar else engine.policy_step(samples)
            steps.append((metrics, {name: tensor.clone() for name, tensor in engine.full_weights()}))
        read = engine.scores([s.ids for s in samples]) if scalar else engine.logprobs(samples[0].ids)
        found.append({"steps": steps, "read": read})
    return found


@pytest.fixture(scope="module")
def mqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose four heads share one of keys and values."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 512, "pad_token_id": 0}
    path = tmp_path_factory.mktemp("mqa")
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def with_a_long_one(samples: list[Sample]) -> list[Sample]:
    """One of 101 tokens, of which a rank holds at most 64, and which has no loss token in its first 60; and one with tokens
    of which the engine has the policy's weights."""
    rng = np.random.default_rng(5)
    mask = rng.random(96) > 0.3
    mask[:55] = False
    long = Sample(
        ids=rng.integers(0, VOCAB, 101).astype(np.int32),
        prompt_len=5,
        mask=mask,
        behaviour_logprobs=np.where(mask, rng.normal(-5.8, 0.3, 96), 0.0).astype(np.float32),
        advantage=1.7,
    )
    return [long, replace(samples[0], on_policy=True), *samples[1:]]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for (metrics, weights), (expected_metrics, expected_weights) in zip(found["steps"], expected["steps"], strict=True):
        assert metrics == pytest.approx(expected_metrics, abs=1e-5, rel=1e-5)
        assert weights.keys() == expected_weights.keys()
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    np.testing.assert_allclose(found["read"], expected["read"], atol=1e-5, rtol=1e-5)


def test_ranks_that_share_micro_batches_train_as_one_rank_does(
    tiny_model: Path, mqa: Path, with_a_long_one: list[Sample], pairs: list[Pair], tmp_path: Path
) -> None:
    whole = [
        config(tiny_model, zero_stage=0),
        config(tiny_model, zero_stage=3, gradient_checkpointing=True, num_minibatches=2, micro_batch_tokens=256),
        config(mqa, lora=LoraConfig(rank=4)),
        config(tiny_model, head="scalar"),
    ]
    expected = train(whole, with_a_long_one, pairs)
    (_, first), (_, second) = expected[0]["steps"]
    assert max((second[name] - tensor).abs().max() for name, tensor in first.items()) > 1e-3
    for num_learners, cases in ((2, whole), (4, whole[:1])):  # one group, and two
        settings = [shared(each, num_learners, 2) for each in cases]
        for found in on_ranks(num_learners, tmp_path, train, settings, with_a_long_one, pairs):
            for ours, theirs in zip(found, expected[: len(cases)], strict=True):
                assert_same(ours, theirs)


def test_models_that_ranks_cannot_share_are_refused(tiny_model: Path) -> None:
    settings = LearnerConfig(model=str(tiny_model), num_learners=3, sequence_parallel_size=3)
    with pytest.raises(
        ValueError, match=r"sequence_parallel_size=3: .* 4 .* 2 heads of keys and values; set one of 1, 2, 4"
    ):
        load_model(settings.model, settings, torch.device("cpu"))
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    lm.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "rotary positions depend on the largest position" in str(sharing_fault(lm, WHOLE))
    lm.config.layer_types = ["full_attention", "linear_attention"]
    assert "layers of the type linear_attention" in str(sharing_fault(lm, WHOLE))
