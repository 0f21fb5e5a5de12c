"""What learners publish: its checksums, and the NCCL path as far as it goes without a GPU: what we hand to vLLM's trainer
engine is what it asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from learners.batching import Sample
from learners.config import LearnerConfig, LossConfig
from learners.engine import DeepSpeedEngine
from learners.published_sums import SAMPLED_ENTRIES, PublishedSums
from learners.weight_sync import HostMemory, NCCLBroadcast, _weight_source, engine_init_info, host_update, nccl_update
from models.checksums import WeightsDtype, checksum
from models.on_disk import is_half_precision
from models.weight_update import WeightUpdate

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.fixture(params=[2, 3], ids=["zero2", "zero3"])
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> DeepSpeedEngine:
    return DeepSpeedEngine(LearnerConfig(model=str(tiny_model), zero_stage=request.param))


def test_declared_weights_are_those_that_are_sent(engine: DeepSpeedEngine) -> None:
    """vLLM's own check of a source, element by element, and the engines' view of the same."""
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerWeightTransferEngine,
        NCCLWeightTransferInitInfo,
        NCCLWeightTransferUpdateInfo,
    )

    source = _weight_source(engine)
    sent = list(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
    update = nccl_update(engine)
    NCCLWeightTransferUpdateInfo(list(update.names), list(update.dtypes), [list(s) for s in update.shapes])
    assert [name for name, _ in sent] == list(update.names)
    assert [tuple(tensor.shape) for _, tensor in sent] == list(update.shapes)
    assert {f"torch.{d}" for d in update.dtypes} == {str(tensor.dtype) for _, tensor in sent} == {"torch.float32"}
    kept = dict(sent)["lm_head.weight"]  # also with ZeRO-3, where the gathered parameter is gone by now
    assert kept.shape == (330, 64)
    assert torch.isfinite(kept).all()
    info = NCCLWeightTransferInitInfo(**engine_init_info("10.0.0.1", 1234, num_engine_workers=3))
    assert (info.world_size, info.rank_offset, info.packed) == (4, 1, True)


def test_both_sides_pack_into_buffers_of_one_size_smaller_than_vllm_would(
    engine: DeepSpeedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    asked: list[NCCLTrainerInitInfo] = []
    factory = "vllm.distributed.weight_transfer.factory.WeightTransferTrainerFactory.trainer_init"
    monkeypatch.setattr(factory, lambda info, **_: asked.append(info))
    NCCLBroadcast(engine, "10.0.0.1", 1234, num_engine_workers=3)
    (trainers,) = asked
    engines = engine_init_info("10.0.0.1", 1234, num_engine_workers=3)
    assert trainers.packed_buffer_size_bytes == engines["packed_buffer_size_bytes"] == 256 << 20
    assert trainers.packed_num_buffers == engines["packed_num_buffers"]


def test_ranks_other_than_the_sender_only_take_part_in_gathering(
    engine: DeepSpeedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    real = engine.full_weights

    def counted() -> Any:
        passes.append(sum(1 for _ in real()))
        return iter(())

    monkeypatch.setattr(engine, "rank", 1)
    monkeypatch.setattr(engine, "full_weights", counted)
    broadcast = NCCLBroadcast(engine, "10.0.0.1", 1234, num_engine_workers=3)  # opens no connection
    broadcast.send()
    broadcast.send()
    broadcast.close()
    assert passes == [len(engine.plain_weights)] * 2


def tensors_of(update: WeightUpdate | None) -> dict[str, torch.Tensor]:
    assert update is not None
    return {name: torch.from_numpy(array.copy()) for name, (array, _) in update.payload.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checksums_are_of_what_is_published_and_changes_are_counted(
    tiny_model: Path, samples: list[Sample], dtype: WeightsDtype
) -> None:
    engine = DeepSpeedEngine(LearnerConfig(model=str(tiny_model), lr=1e-5), LossConfig())
    memory, sums, announced = HostMemory(), PublishedSums(dtype), PublishedSums(dtype)
    before = tensors_of(host_update(engine, memory, sums))
    first = sums.finish(0)
    assert (first.policy_version, first.dtype, first.changed_share) == (0, dtype, None)
    engine.policy_step(samples)
    after = tensors_of(host_update(engine, memory, sums))
    second = sums.finish(1)
    nccl_update(engine, announced)
    assert announced.finish(1).sums == second.sums

    rounded = getattr(torch, dtype)
    assert first.sums == {name: int(checksum(tensor, rounded)) for name, tensor in before.items()}
    assert second.sums == {name: int(checksum(tensor, rounded)) for name, tensor in after.items()}
    changed = sum(int((before[name].to(rounded) != after[name].to(rounded)).sum()) for name in before)
    entries = sum(tensor.numel() for tensor in before.values())
    assert entries < SAMPLED_ENTRIES  # so that all are compared
    assert second.changed_share == changed / entries
    assert (second.changed_share > 0.9) == (dtype == "float32")  # most changes are lost in rounding

    host_update(engine, memory, sums)
    assert sums.finish(1).changed_share == 0.0


def test_of_a_large_model_a_sample_is_compared(monkeypatch: pytest.MonkeyPatch, engine: DeepSpeedEngine) -> None:
    monkeypatch.setattr("learners.published_sums.SAMPLED_ENTRIES", 1000)
    sums = PublishedSums("float32")
    half = {tensor.name: index % 2 for index, tensor in enumerate(engine.to_publish)}
    for factor in (1.0, 2.0):
        sums.begin(engine.to_publish)
        for name, tensor in engine.published_weights():
            sums.add(name, tensor * (factor if half[name] else 1.0) + 1.0)
        found = sums.finish(0)
    sizes = {tensor.name: torch.Size(tensor.shape).numel() for tensor in engine.to_publish}
    share = sum(size for name, size in sizes.items() if half[name]) / sum(sizes.values())
    assert found.changed_share == pytest.approx(share, abs=0.05)


def test_the_type_of_a_checkpoint_is_read_from_its_configuration(tmp_path: Path) -> None:
    for config, expected in [
        ('{"dtype": "float16"}', True),
        ('{"torch_dtype": "float16"}', True),
        ('{"text_config": {"dtype": "float16"}, "dtype": "float32"}', True),
        ('{"dtype": "bfloat16"}', False),
        ("{}", False),
    ]:
        (tmp_path / "config.json").write_text(config)
        assert is_half_precision(str(tmp_path)) is expected, config
