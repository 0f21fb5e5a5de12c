"""The NCCL path as far as it goes without a GPU: what we hand to vLLM's trainer engine is what it asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from learners.config import LearnerConfig
from learners.engine import DeepSpeedEngine
from learners.weight_sync import NCCLBroadcast, _weight_source, engine_init_info, nccl_update

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
