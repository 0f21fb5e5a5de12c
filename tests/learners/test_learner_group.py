"""Two real ranks over gloo, started by Ray: same update as plain torch, resume at another size, death and rebirth."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from plain_reference import plain_logprobs, plain_policy_training
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config

from learners.batching import Sample
from learners.config import LearnerConfig, LossConfig
from learners.engine import DeepSpeedEngine
from learners.errors import AllocationFailed, LearnerDied, LearnerError, LearnerFailed, LearnerTimeout, failed
from learners.group import LearnerGroup
from models.checksums import checksum
from models.weight_update import WeightUpdate

pytestmark = pytest.mark.ray

LOSS = LossConfig(algorithm="dapo", is_max=1.5)
SHAPE: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def config(model: Path, **settings: Any) -> LearnerConfig:
    return LearnerConfig(
        model=str(model),
        lr=1e-2,
        eps=1e-3,
        micro_batch_tokens=150,  # several micro-batches on each rank
        start_timeout_s=120,
        step_timeout_s=60,
        **settings,
    )


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def learners(request: pytest.FixtureRequest, ray_cluster: None, tiny_model: Path) -> Iterator[LearnerGroup]:
    group = LearnerGroup(config(tiny_model, num_learners=2, zero_stage=request.param), LOSS, probe_ids=range(5, 25))
    group.start()
    yield group
    group.shutdown()


def pids(group: LearnerGroup) -> list[int]:
    return ray.get([rank.__ray_call__.remote(lambda _: os.getpid()) for rank in group._ranks], timeout=30)


def assert_update_equals(update: WeightUpdate, expected: dict[str, torch.Tensor], atol: float) -> None:
    assert set(update.names) == expected.keys() == set(update.payload)
    for name, dtype, shape in zip(update.names, update.dtypes, update.shapes, strict=True):
        array, payload_dtype = update.payload[name]
        assert payload_dtype == dtype == "float32"
        assert array.shape == shape == tuple(expected[name].shape)
        np.testing.assert_allclose(array, expected[name].numpy(), atol=atol, rtol=0, err_msg=name)


def test_two_ranks_train_save_resume_at_one_die_and_come_back(
    learners: LearnerGroup, tiny_model: Path, samples: list[Sample], tmp_path: Path, single_rank: None
) -> None:
    # Two steps of two ranks are two steps of plain torch on the whole batch.
    results = [learners.start_step(samples).result() for _ in range(2)]
    reference, metrics = plain_policy_training(tiny_model, samples, learners.config, LOSS, num_steps=2)
    for result, expected in zip(results, metrics, strict=True):
        assert result.metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert result.metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert [r.policy_version for r in results] == [1, 2]
    update = ray.get(results[-1].update, timeout=30)
    assert update.policy_version == 2
    assert_update_equals(update, reference, atol=1e-5)
    checksums = results[-1].checksums
    assert checksums is not None
    assert checksums.sums == {
        name: int(checksum(torch.from_numpy(array.copy()), torch.float32))
        for name, (array, _) in update.payload.items()
    }
    assert checksums.changed_share is not None
    assert checksums.changed_share > 0.9

    # What it exports is what the probe was taken from.
    learners.export_hf(tmp_path / "exported")
    probe = results[-1].probe
    assert probe is not None
    assert probe.token_ids == tuple(range(5, 25))
    np.testing.assert_allclose(
        plain_logprobs(tmp_path / "exported", np.arange(5, 25, dtype=np.int32)), probe.logprobs, atol=1e-5
    )

    # One rank, in this process, goes on from the two ranks' checkpoint exactly as they do.
    learners.save_to_path(tmp_path / "checkpoint")
    third = learners.start_step(samples).result()
    assert set(third.seconds) == {"pack", "logprobs", "gradients", "optimizer", "publish"}
    resumed = DeepSpeedEngine(config(tiny_model, zero_stage=learners.config.zero_stage), LOSS)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.policy_version == 2
    assert resumed.policy_step(samples)["loss"] == pytest.approx(third.metrics["loss"], abs=1e-5)
    assert_update_equals(ray.get(third.update, timeout=30), dict(resumed.full_weights()), atol=1e-5)

    # A step whose loss is NaN on one rank is skipped by both, and the next is taken as if it had not been.
    assert samples[0].behaviour_logprobs is not None
    nan = replace(samples[0], behaviour_logprobs=samples[0].behaviour_logprobs * np.float32("nan"))
    skipped = learners.start_step([nan, *samples[1:]]).result()
    assert (skipped.applied, skipped.metrics) == (False, {"skipped/nonfinite_loss": 1.0})
    assert (skipped.policy_version, skipped.probe) == (3, None)
    assert ray.get(skipped.update, timeout=30) is None

    # With less samples than ranks one of them trains on a filler, which changes nothing.
    assert learners.start_step(samples[:1]).result().metrics == pytest.approx(
        resumed.policy_step(samples[:1]), abs=1e-5
    )

    # A rank is killed in the middle of a step: named within seconds, then a new group continues from the checkpoint.
    victim = pids(learners)[1]
    step = learners.start_step(samples * 20)
    assert step.poll() is None
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(LearnerDied, match="train_step: rank 1 of 2 died"):
        step.result()
    assert time.monotonic() - start < 10
    assert not learners.alive
    with pytest.raises(LearnerError, match="recreate"):
        learners.start_step(samples).result()
    if learners.config.zero_stage == 3:  # one rebirth is enough for this test's time
        return
    learners.recreate(tmp_path / "checkpoint")
    assert learners.policy_version == 2
    again = learners.start_step(samples).result()
    assert again.metrics["loss"] == pytest.approx(third.metrics["loss"], abs=1e-5)
    assert again.policy_version == 3

    # The weights of a dead group can still be fetched: they are not lost with the rank that made them.
    assert ray.get(third.update, timeout=30).policy_version == 3

    # A rank's own exception is named too.
    bad = Sample(ids=np.full(10, 10**6, dtype=np.int32), prompt_len=2, mask=np.ones(8, dtype=np.bool_), advantage=1.0)
    with pytest.raises(LearnerFailed, match=r"train_step: rank \d raised IndexError: index out of range"):
        learners.start_step([bad, bad]).result()


def test_waits_end_at_their_deadline_and_name_what_was_waited_for(ray_cluster: None, tiny_model: Path) -> None:
    free = ray.available_resources()["CPU"]
    for num_learners, message in (
        (9, r"no room for 9 learners of {'CPU': 1} within 1 s; free in the cluster: .*'CPU'"),
        (1, r"(address|start): no answer from ranks \[0\] within"),  # a rank can't import torch in a second
    ):
        with pytest.raises(LearnerTimeout, match=message):
            LearnerGroup(
                config(tiny_model, num_learners=num_learners).model_copy(update={"start_timeout_s": 1.0})
            ).start()
    until = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0.0) < free and time.monotonic() < until:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == free, "a group that failed to start must give back what it reserved"


def test_what_is_to_be_known_of_a_model_reaches_the_driver_once(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft_caps = Gemma2Config(**SHAPE, final_logit_softcapping=None)
    AutoModelForCausalLM.from_config(soft_caps).save_pretrained(tmp_path)
    group = LearnerGroup(config(tmp_path), LOSS)
    try:
        group.start()
        (note,) = group.notes
        assert "soft caps" in note
        group.recreate()
        assert group.notes == (note,)
        assert [record.getMessage() for record in caplog.records if record.name == "learners.group"] == [note]
    finally:
        group.shutdown()


def test_a_model_whose_weights_engines_could_not_take_is_refused_at_its_load(ray_cluster: None, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE)).save_pretrained(tmp_path)
    save_file({"mtp.fc.weight": torch.zeros(2)}, tmp_path / "model-mtp.safetensors", metadata={"format": "pt"})
    group = LearnerGroup(config(tmp_path), LOSS, probe_ids=range(5, 25))
    with pytest.raises(LearnerFailed, match=r"holds tensors that training doesn't have: mtp\.fc\.weight"):
        group.start()
    supervised = LearnerGroup(config(tmp_path))  # publishes nothing
    supervised.start()
    supervised.shutdown()


@pytest.mark.parametrize("allocate", [torch.empty, np.empty], ids=["torch", "numpy"])
def test_an_allocation_that_failed_is_an_error_of_its_own(allocate: Callable[[int], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate(1 << 55)
    found = failed("train_step", 1, raised.value)
    assert type(found) is AllocationFailed
    assert str(found).startswith("train_step: rank 1 raised ")
    assert type(failed("train_step", 1, RuntimeError("a shape doesn't fit"))) is LearnerFailed
