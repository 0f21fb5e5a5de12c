"""Which learners can load a checkpoint, as it says of itself."""

import pytest

from learners.checkpoint_format import check, kind
from learners.config import LearnerConfig, LoraConfig


def learner(**settings: object) -> LearnerConfig:
    return LearnerConfig.model_validate({"model": "m", **settings})


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"zero_stage": 3}, {"zero_stage": 1}, "zero_stage=3, which zero_stage=1 can't load"),
        ({"zero_stage": 3}, {"zero_stage": 2}, "zero_stage=3, which zero_stage=2 can't load"),
        ({"zero_stage": 2}, {"zero_stage": 3}, "set zero_stage=2"),
        ({"zero_stage": 0}, {"zero_stage": 1}, "set zero_stage=0"),
        ({"dtype": "bfloat16"}, {}, "in bfloat16, and these train in float32: set dtype='bfloat16'"),
        ({"num_gpus_per_learner": 1}, {}, "in bfloat16, and these train in float32"),
        ({}, {"lora": LoraConfig(rank=4)}, "holds all weights and this learner trains adapters"),
        ({"weight_decay": 0.1}, {}, "with weight decay, .* weight_decay=0 must be above 0"),
        ({}, {"weight_decay": 0.1}, "without weight decay, .* weight_decay=0.1 must stay 0"),
    ],
)
def test_what_does_not_fit_is_named(then: dict[str, object], now: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(kind(learner(**then)), learner(**now), "there")


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"zero_stage": 1}, {"zero_stage": 2}),
        ({"zero_stage": 2}, {"zero_stage": 1}),
        ({"num_learners": 4}, {"num_learners": 1}),
        ({"lr": 1e-3, "betas": (0.5, 0.6), "weight_decay": 0.5}, {"lr": 1e-5, "weight_decay": 0.1}),
    ],
)
def test_what_fits_is_taken(then: dict[str, object], now: dict[str, object]) -> None:
    check(kind(learner(**then)), learner(**now), "there")


def test_an_older_checkpoint_says_less() -> None:
    check({"zero_stage": 2, "adapters_only": False, "world_size": 1}, learner(dtype="bfloat16", zero_stage=2), "there")
