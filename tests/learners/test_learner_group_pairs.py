"""Two real ranks over gloo: pairs, scores and adapters come out as on one rank."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from plain_reference import plain_scores

from learners.batching import Pair, Sample
from learners.config import LearnerConfig, LoraConfig, LossConfig
from learners.engine import DeepSpeedEngine
from learners.group import LearnerGroup

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("single_rank")]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def config(model: Path, **settings: object) -> LearnerConfig:
    defaults = {"lr": 1e-2, "eps": 1e-3, "micro_batch_tokens": 100, "start_timeout_s": 200, "step_timeout_s": 100}
    return LearnerConfig(model=str(model), **(defaults | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(("zero_stage", "lora"), [(2, None), (3, LoraConfig(rank=4))], ids=["zero2", "zero3-lora"])
def test_two_ranks_train_a_reward_model_as_one_does(
    ray_cluster: None, tiny_model: Path, pairs: list[Pair], tmp_path: Path, zero_stage: int, lora: LoraConfig | None
) -> None:
    settings = config(tiny_model, head="scalar", zero_stage=zero_stage, lora=lora)
    sequences = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    single = DeepSpeedEngine(settings)
    learners = LearnerGroup(settings.model_copy(update={"num_learners": 2}))
    learners.start()
    try:
        for _ in range(2):
            assert learners.pair_step(pairs) == pytest.approx(single.pair_step(pairs), abs=1e-4)
        assert learners.pair_step(pairs[:1]) == pytest.approx(
            single.pair_step(pairs[:1]), abs=1e-4
        )  # a rank has a filler
        scores = learners.scores(sequences)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, single.scores(sequences), atol=1e-4)
        np.testing.assert_allclose(learners.scores(sequences[3:4]), scores[3:4], atol=1e-5)
        assert learners.scores([]).shape == (0,)
        learners.export_hf(tmp_path / "exported")
        np.testing.assert_allclose(plain_scores(tmp_path / "exported", sequences), scores, atol=1e-5)

        # What can't be done is refused before it reaches the ranks.
        same = Pair(chosen=pairs[0].chosen, rejected=pairs[0].chosen)
        with pytest.raises(ValueError, match="pair 1: both sides are the same"):
            learners.pair_step([pairs[0], same])
        with pytest.raises(ValueError, match="policy_step needs head='lm'"):
            learners.start_step([])
        with pytest.raises(ValueError, match="publish needs head='lm'"):
            learners.publish()
        assert learners.alive

        # One rank goes on from two ranks' checkpoint.
        learners.save_to_path(tmp_path / "checkpoint")
        expected = learners.pair_step(pairs)
    finally:
        learners.shutdown()
    resumed = DeepSpeedEngine(settings.model_copy(update={"seed": 3}))
    resumed.load(tmp_path / "checkpoint")
    np.testing.assert_allclose(resumed.scores(sequences), scores, atol=1e-5)
    assert resumed.pair_step(pairs) == pytest.approx(expected, abs=1e-4)


def test_two_ranks_train_a_policy_with_adapters_and_publish_plain_weights(
    ray_cluster: None, tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    settings = config(tiny_model, lora=LoraConfig(rank=4), zero_stage=2)
    loss = LossConfig(kl_estimator="k3", kl_coef=0.1)
    single = DeepSpeedEngine(settings, loss)
    learners = LearnerGroup(settings.model_copy(update={"num_learners": 2}), loss, probe_ids=range(5, 25))
    learners.start()
    try:
        for _ in range(2):
            step = learners.start_step(samples).result()
            assert step.metrics == pytest.approx(single.policy_step(samples), abs=1e-4)
        learners.save_to_path(tmp_path / "checkpoint")
        update = ray.get(step.update, timeout=30)
    finally:
        learners.shutdown()
    plain = dict(single.full_weights())
    assert set(update.names) == plain.keys()
    for name, tensor in plain.items():
        np.testing.assert_allclose(update.payload[name][0], tensor.numpy(), atol=1e-5, err_msg=name)
    assert step.probe is not None
    np.testing.assert_allclose(step.probe.logprobs, single.logprobs(range(5, 25)), atol=1e-4)
    resumed = DeepSpeedEngine(settings.model_copy(update={"seed": 3}), loss)
    resumed.load(tmp_path / "checkpoint")
    for name, tensor in resumed.full_weights():
        np.testing.assert_allclose(tensor.numpy(), plain[name].numpy(), atol=1e-5, err_msg=name)
