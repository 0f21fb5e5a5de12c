from typing import Any

import pytest
from pydantic import ValidationError

from learners.config import LearnerConfig, LoraConfig, LossConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_coef": 0.1}, "kl_estimator='none' contradicts kl_coef=0.1"),
        ({"kl_estimator": "k3"}, "kl_estimator='k3' contradicts kl_coef=0.0"),
        ({"algorithm": "dr_grpo"}, "divides by a constant length"),
        ({"algorithm": "dapo", "max_response_tokens": 100}, "has no effect with algorithm=.dapo."),
        ({"algorithm": "gspo", "is_level": "token"}, "gspo has one ratio a sequence"),
        ({"is_min": 0.5}, "is_min has no effect with is_correction='tis'"),
        ({"is_correction": "mis", "is_min": 2.0, "is_max": 1.5}, "leaves nothing below is_max=1.5"),
        ({"eps_low": 1.5}, "negative ratio"),
        ({"epsilon": 0.2}, "Extra inputs are not permitted"),
    ],
)
def test_contradicting_loss_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LossConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine"}, "needs total_steps"),
        ({"warmup_steps": 10, "total_steps": 10}, "must be less than total_steps=10"),
        ({"num_gpus_per_learner": 2}, "raise num_learners"),
        ({"weight_sync": "nccl"}, "needs num_gpus_per_learner=1"),
        ({"num_learners": 3, "sequence_parallel_size": 2}, "=2 doesn't divide num_learners=3: set num_learners"),
        ({"num_learners": 2, "sequence_parallel_size": 2, "attention": "sdpa"}, "set attention to 'auto' or 'varlen'"),
        ({"head": "scalar", "temperature": 0.7}, "temperature=0.7 has no effect with head='scalar'"),
        ({"head": "scalar", "num_minibatches": 2}, "num_minibatches=2 has no effect with head='scalar'"),
        ({"lora": {"targets": ()}}, "leaves nothing to train"),
        ({"lora": {"dropout": 1.0}}, "less than 1"),
        ({"zero_stage": 4}, "Input should be 0, 1, 2 or 3"),
    ],
)
def test_contradicting_learner_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LearnerConfig(model="m", **settings)


def test_defaults_follow_the_algorithm() -> None:
    assert LossConfig().clip_range == (0.2, 0.28)
    assert LossConfig(algorithm="gspo").clip_range == (3e-4, 4e-4)
    assert LossConfig(algorithm="gspo", eps_high=0.1).clip_range == (3e-4, 0.1)
    assert LossConfig(algorithm="gspo").sequence_level_is
    assert not LossConfig(algorithm="cispo").sequence_level_is
    assert LossConfig(algorithm="dr_grpo", max_response_tokens=9).reward_scale == "none"
    assert LossConfig(algorithm="dapo").reward_scale == "std"


def test_calls_and_losses_that_contradict_the_head_name_the_field() -> None:
    scalar, lm = LearnerConfig(model="m", head="scalar"), LearnerConfig(model="m")
    for call in ("policy_step", "sft_step", "publish", "logprobs"):
        lm.check_call(call)
        with pytest.raises(ValueError, match=f"{call} needs head='lm', and this learner has head='scalar'"):
            scalar.check_call(call)
    for call in ("pair_step", "scores"):
        scalar.check_call(call)
        with pytest.raises(ValueError, match=f"{call} needs head='scalar', and this learner has head='lm'"):
            lm.check_call(call)
    penalty = LossConfig(kl_estimator="k3", kl_coef=0.1)
    lm.check_loss(penalty)
    with pytest.raises(ValueError, match=r"kl_coef=0.1 contradicts head='scalar'"):
        scalar.check_loss(penalty)
    with pytest.raises(ValueError, match=r"lora.dropout=0.1: engines sample without dropout"):
        LearnerConfig(model="m", lora=LoraConfig(dropout=0.1)).check_call("policy_step")
    LearnerConfig(model="m", lora=LoraConfig(dropout=0.1)).check_call("sft_step")
