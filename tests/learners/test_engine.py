"""One rank of DeepSpeed against plain torch and plain transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_reference import plain_logprobs, plain_policy_training, plain_policy_training_with_kl

from learners.batching import Sample, minibatches
from learners.config import LearnerConfig, LossConfig
from learners.engine import DeepSpeedEngine
from learners.schedule import learning_rate
from learners.weight_sync import HostMemory, host_update

pytestmark = [pytest.mark.usefixtures("single_rank"), pytest.mark.slow]


def config(model: Path, **settings: Any) -> LearnerConfig:
    # A large Adam ε keeps the update smooth in the gradient, so that float noise isn't blown up to ±lr.
    return LearnerConfig(model=str(model), lr=1e-2, eps=1e-3, micro_batch_tokens=4096, **settings)


def weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.full_weights()}


def assert_same_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_logprobs_equal_plain_transformers(tiny_model: Path, samples: list[Sample]) -> None:
    for temperature in (1.0, 0.7):
        engine = DeepSpeedEngine(config(tiny_model, temperature=temperature))
        expected = plain_logprobs(tiny_model, samples[0].ids, temperature)
        np.testing.assert_allclose(engine.logprobs(samples[0].ids), expected, atol=1e-5)
        at_one = plain_logprobs(tiny_model, samples[0].ids, 1.0)
        np.testing.assert_allclose(engine.logprobs(samples[0].ids, temperature=1.0), at_one, atol=1e-5)
        np.testing.assert_allclose(engine.logprobs(samples[0].ids), expected, atol=1e-5)  # training's again


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_training_equals_plain_torch(tiny_model: Path, samples: list[Sample], zero_stage: int) -> None:
    loss = LossConfig(algorithm="dapo", is_max=1.5)
    engine = DeepSpeedEngine(config(tiny_model, zero_stage=zero_stage), loss)
    metrics = [engine.policy_step(samples) for _ in range(3)]
    expected_weights, expected = plain_policy_training(tiny_model, samples, engine.config, loss, num_steps=3)
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert_same_weights(weights(engine), expected_weights, atol=1e-5)
    assert (engine.num_steps, engine.policy_version) == (3, 3)


def test_micro_batches_checkpointing_and_blocks_of_logits_change_nothing(
    tiny_model: Path, samples: list[Sample]
) -> None:
    """One rectangle; the smallest micro-batches; recomputed activations with the logits in blocks of 3 rows, and the
    same with parameters that come and go."""
    recomputed = {"gradient_checkpointing": True}
    results = []
    for settings in ({}, {"micro_batch_tokens": 60}, recomputed, recomputed | {"zero_stage": 3}):
        engine = DeepSpeedEngine(config(tiny_model).model_copy(update=settings), LossConfig(algorithm="gspo"))
        if settings.get("gradient_checkpointing"):
            engine._module.chunk_bytes = 3 * 4 * 330
        metrics = engine.policy_step(samples)
        results.append((metrics, weights(engine)))
    for metrics, after in results[1:]:
        assert metrics == pytest.approx(results[0][0], abs=1e-5)
        assert_same_weights(after, results[0][1], atol=1e-5)


def test_packed_sequences_train_as_padded_ones_do(tiny_model: Path, samples: list[Sample]) -> None:
    results = []
    for attention in ("sdpa", "varlen"):
        engine = DeepSpeedEngine(config(tiny_model, attention=attention))
        results.append((engine.policy_step(samples), weights(engine), engine.logprobs(samples[0].ids)))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-5)
    assert_same_weights(results[1][1], results[0][1], atol=1e-5)
    np.testing.assert_allclose(results[1][2], results[0][2], atol=1e-5)


def test_second_minibatch_sees_the_proximal_policy_of_before_the_first(tiny_model: Path, samples: list[Sample]) -> None:
    engine = DeepSpeedEngine(config(tiny_model, num_minibatches=2))
    metrics = engine.policy_step(samples)
    assert (engine.num_steps, engine.policy_version) == (1, 1)
    assert metrics["ratio_max"] > 1.01  # the first update has moved the policy away from it
    single = DeepSpeedEngine(config(tiny_model)).policy_step(samples)
    assert single["ratio_max"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["engine_kl"] == pytest.approx(single["engine_kl"], rel=0.5)


def test_kl_to_the_frozen_reference_starts_at_zero_and_grows(tiny_model: Path, samples: list[Sample]) -> None:
    engine = DeepSpeedEngine(config(tiny_model), LossConfig(kl_estimator="k3", kl_coef=0.1))
    kls = [engine.policy_step(samples)["kl_ref"] for _ in range(3)]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert kls[0] < kls[1] < kls[2]


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_kl_holds_for_all_samples_and_has_the_policy_terms_denominator(
    tiny_model: Path, samples: list[Sample], algorithm: str
) -> None:
    """Eight of eleven samples have no advantage, and one more has nothing sampled: against float64 autograd on all."""
    mixed = [replace(s, advantage=s.advantage if i < 3 else 0.0) for i, s in enumerate(samples)]
    empty = replace(samples[0], mask=np.zeros_like(samples[0].mask), advantage=-1.0)
    loss = LossConfig.model_validate({"algorithm": algorithm, "kl_estimator": "k3", "kl_coef": 0.5, "is_max": 1.5})
    engine = DeepSpeedEngine(config(tiny_model), loss)
    for _ in range(3):
        engine.policy_step([*mixed, empty])
    expected = plain_policy_training_with_kl(tiny_model, [*mixed, empty], engine.config, loss, num_steps=3)
    assert_same_weights(weights(engine), expected, atol=1e-5)


def test_samples_without_a_gradient_count_in_the_mean_but_cost_no_pass(tiny_model: Path, samples: list[Sample]) -> None:
    mixed = [replace(s, advantage=s.advantage if i < 3 else 0.0) for i, s in enumerate(samples)]
    engine = DeepSpeedEngine(config(tiny_model), LossConfig(is_max=1.5))
    metrics = engine.policy_step(mixed)
    expected_weights, expected = plain_policy_training(
        tiny_model, mixed, engine.config, engine.loss_config, num_steps=1
    )
    assert metrics["loss"] == pytest.approx(expected[0]["loss"], abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-4)
    assert_same_weights(weights(engine), expected_weights, atol=1e-5)
    alone = DeepSpeedEngine(config(tiny_model), LossConfig(is_max=1.5)).policy_step(mixed[:3])
    assert metrics["entropy"] == pytest.approx(alone["entropy"], rel=1e-5)  # a mean over what was passed
    with pytest.raises(ValueError, match="none of the 8 samples has a gradient"):
        engine.policy_step(mixed[3:])


def step_that_is_not_finite(engine: DeepSpeedEngine, samples: list[Sample], kind: str) -> dict[str, float]:
    """On a batch whose loss is NaN because of its first sample, or with a gradient that overflows behind a good loss."""
    if kind == "nonfinite_loss":
        assert samples[0].behaviour_logprobs is not None
        nan = samples[0].behaviour_logprobs * np.float32("nan")
        return engine.policy_step([replace(samples[0], behaviour_logprobs=nan), *samples[1:]])
    hook = engine.plain_weights[-1].parameter.register_hook(lambda gradient: gradient * 1e38 * 1e38)
    try:
        return engine.policy_step(samples)
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ["nonfinite_loss", "nonfinite_gradient"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_changes_nothing(
    tiny_model: Path, samples: list[Sample], zero_stage: int, dtype: str, max_grad_norm: float, kind: str
) -> None:
    """Between two good steps it is as if it had never been: weights, moments, learning rate and versions."""
    settings = config(
        tiny_model, zero_stage=zero_stage, dtype=dtype, max_grad_norm=max_grad_norm, schedule="cosine", total_steps=4
    )
    engine, spared = DeepSpeedEngine(settings), DeepSpeedEngine(settings)
    for each in (engine, spared):
        each.policy_step(samples)
    before = weights(engine)
    assert step_that_is_not_finite(engine, samples, kind) == {f"skipped/{kind}": 1.0}
    assert_same_weights(weights(engine), before, atol=0)
    assert (engine.num_steps, engine.policy_version) == (1, 1)
    expected = spared.policy_step(samples)
    assert engine.policy_step(samples) == pytest.approx(expected, rel=1e-6)
    assert_same_weights(weights(engine), weights(spared), atol=0)


def test_of_two_minibatches_the_one_that_is_finite_is_trained_on(tiny_model: Path, samples: list[Sample]) -> None:
    engine = DeepSpeedEngine(config(tiny_model, num_minibatches=2))
    metrics = step_that_is_not_finite(engine, samples, "nonfinite_loss")
    assert metrics["skipped/nonfinite_loss"] == 1.0
    left_out = minibatches(samples, 2, with_kl=False)[0]  # the one with the first sample
    assert metrics["samples_skipped"] == len(left_out.samples)
    assert np.isfinite(list(metrics.values())).all()
    assert (engine.num_steps, engine.policy_version) == (1, 1)
    assert all(bool(tensor.isfinite().all()) for tensor in weights(engine).values())


def test_supervised_steps_are_skipped_likewise(tiny_model: Path, samples: list[Sample]) -> None:
    engine = DeepSpeedEngine(config(tiny_model, max_grad_norm=0.0))
    engine.plain_weights[-1].parameter.data[7] = float("inf")
    assert engine.sft_step(samples) == {"skipped/nonfinite_loss": 1.0}
    assert engine.num_steps == 0


def test_sft_learns_only_what_is_unmasked(tiny_model: Path, samples: list[Sample]) -> None:
    engine = DeepSpeedEngine(config(tiny_model))
    expected = np.concatenate([plain_logprobs(tiny_model, s.ids)[s.prompt_len - 1 :][s.mask] for s in samples]).mean()
    losses = [engine.sft_step(samples)["loss"] for _ in range(15)]
    assert losses[0] == pytest.approx(-expected, abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert engine.policy_version == 0


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bfloat16_has_float32_master_weights(tiny_model: Path, samples: list[Sample], zero_stage: int) -> None:
    """A learning rate far below bfloat16's resolution still adds up."""
    settings = config(tiny_model, dtype="bfloat16", zero_stage=zero_stage)
    engine = DeepSpeedEngine(settings.model_copy(update={"lr": 1e-5, "eps": 1e-8}))
    before = weights(engine)
    assert {t.dtype for t in before.values()} == {torch.bfloat16}
    first = engine.sft_step(samples)["loss"]
    for _ in range(59):
        last = engine.sft_step(samples)["loss"]
    assert last < first - 0.02
    update = host_update(engine, HostMemory())
    assert update is not None
    array, dtype = update.payload["lm_head.weight"]
    assert (array.dtype, dtype) == (np.uint16, "bfloat16")
    restored = torch.from_numpy(array).view(torch.bfloat16)
    assert torch.equal(restored, weights(engine)["lm_head.weight"])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_checkpoint_continues_as_if_never_stopped(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, zero_stage: int
) -> None:
    settings = config(tiny_model, zero_stage=zero_stage, schedule="cosine", total_steps=5, warmup_steps=1)
    engine = DeepSpeedEngine(settings)
    engine.policy_step(samples)
    engine.save(tmp_path / "checkpoint")
    engine.policy_step(samples)
    expected = weights(engine)
    resumed = DeepSpeedEngine(settings)
    resumed.load(tmp_path / "checkpoint")
    assert (resumed.num_steps, resumed.policy_version) == (1, 1)
    resumed.policy_step(samples)
    assert_same_weights(weights(resumed), expected, atol=1e-6)
    (tmp_path / "checkpoint" / "learner.json").unlink()
    with pytest.raises(ValueError, match="no complete learner checkpoint"):
        resumed.load(tmp_path / "checkpoint")


def test_export_loads_in_plain_transformers(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    engine = DeepSpeedEngine(config(tiny_model))
    engine.sft_step(samples)
    for _ in range(2):  # the second replaces the first
        engine.export_hf(tmp_path / "exported")
    expected = engine.logprobs(samples[1].ids)
    np.testing.assert_allclose(plain_logprobs(tmp_path / "exported", samples[1].ids), expected, atol=1e-5)
    assert np.abs(plain_logprobs(tiny_model, samples[1].ids) - expected).max() > 1e-3
    assert list(tmp_path.glob(".*.partial")) == []


def test_host_update_is_a_copy_that_the_next_one_overwrites(tiny_model: Path, samples: list[Sample]) -> None:
    engine = DeepSpeedEngine(config(tiny_model))
    memory = HostMemory()
    update = host_update(engine, memory)
    assert update is not None
    first = {name: array.copy() for name, (array, _) in update.payload.items()}
    engine.sft_step(samples)
    for name, (array, _) in update.payload.items():
        np.testing.assert_array_equal(array, first[name])
    assert update.names[0] == "model.embed_tokens.weight"
    assert update.shapes[0] == (330, 64)
    assert set(update.dtypes) == {"float32"}
    newer = host_update(engine, memory)
    assert newer is not None
    for name, tensor in weights(engine).items():
        array = newer.payload[name][0]
        np.testing.assert_array_equal(array, tensor.numpy())
        assert np.shares_memory(array, update.payload[name][0])
        others = [other for key, (other, _) in newer.payload.items() if key != name]
        assert not any(np.shares_memory(array, other) for other in others)


def test_minibatches_do_not_shorten_the_schedule(tiny_model: Path, samples: list[Sample]) -> None:
    """`total_steps` counts batches. Four of them in two minibatches each: 1, 0.85…, 0.5 and 0.14… of the peak, then 0."""
    engine = DeepSpeedEngine(config(tiny_model, num_minibatches=2, schedule="cosine", total_steps=4))
    rates = [engine.policy_step(samples)["lr"] for _ in range(5)]
    half = 0.5 * 2**-0.5
    assert rates == pytest.approx([1e-2, 1e-2 * (0.5 + half), 0.5e-2, 1e-2 * (0.5 - half), 0.0], abs=1e-9)


def test_learning_rate_by_hand() -> None:
    settings = LearnerConfig(model="m", lr=8.0, schedule="cosine", warmup_steps=2, total_steps=6)
    assert [learning_rate(s, settings) for s in (0, 1, 2, 4, 6, 9)] == pytest.approx([4, 8, 8, 4, 0, 0])
    assert learning_rate(7, LearnerConfig(model="m", lr=8.0)) == 8.0


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_resumed_optimizer_has_the_settings_of_now(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, zero_stage: int
) -> None:
    engine = DeepSpeedEngine(config(tiny_model, zero_stage=zero_stage, betas=(0.5, 0.6), weight_decay=0.5))
    engine.policy_step(samples)
    engine.save(tmp_path / "checkpoint")
    now = config(tiny_model, zero_stage=zero_stage, betas=(0.8, 0.9), weight_decay=0.1)
    resumed = DeepSpeedEngine(now.model_copy(update={"lr": 1e-9}))
    resumed.load(tmp_path / "checkpoint")
    groups = resumed._deepspeed.optimizer.param_groups
    assert [(group["betas"], group["weight_decay"]) for group in groups] == [((0.8, 0.9), 0.1), ((0.8, 0.9), 0.0)]
    assert resumed.policy_step(samples)["lr"] == 1e-9


@pytest.mark.parametrize(("then", "now"), [(1, 2), (2, 1)])
def test_stages_1_and_2_are_converted_into_each_other(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, then: int, now: int
) -> None:
    engine = DeepSpeedEngine(config(tiny_model, zero_stage=then))
    engine.policy_step(samples)
    engine.save(tmp_path / "checkpoint")
    engine.policy_step(samples)
    resumed = DeepSpeedEngine(config(tiny_model, zero_stage=now))
    resumed.load(tmp_path / "checkpoint")
    resumed.policy_step(samples)
    assert_same_weights(weights(resumed), weights(engine), atol=1e-6)


def test_a_checkpoint_of_stage_3_is_refused_by_stage_1_by_name(
    tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    engine = DeepSpeedEngine(config(tiny_model, zero_stage=3))
    engine.policy_step(samples)
    engine.save(tmp_path / "checkpoint")
    other = DeepSpeedEngine(config(tiny_model, zero_stage=1))
    with pytest.raises(ValueError, match=r"was written with zero_stage=3, which zero_stage=1 can't load"):
        other.load(tmp_path / "checkpoint")
