"""Settings that contradict each other are refused before anything starts, by their names."""

from typing import Any

import pytest
from pydantic import ValidationError

from actors.config import EngineConfig, EpisodeConfig, RolloutConfig, RolloutSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_transfer": "nccl"}, "needs device='gpu'"),
        ({"tensor_parallel_size": 2}, "needs device='gpu'"),
        ({"block_size": 16}, "a multiple of 32"),
        ({"max_model_length": 10}, "Extra inputs"),
    ],
)
def test_engine_contradictions(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EngineConfig(model="m", **settings)


def test_an_episode_must_fit_the_engine() -> None:
    with pytest.raises(ValidationError, match=r"= 300 exceeds engine\.max_model_len = 256"):
        RolloutSettings(
            engine=EngineConfig(model="m", max_model_len=256),
            episode=EpisodeConfig(max_prompt_tokens=100, max_response_tokens=200),
            sandbox_address="localhost:1",
        )


@pytest.mark.parametrize(("device", "tensor_parallel_size", "num_gpus"), [("cpu", 1, 1), ("gpu", 2, 1), ("gpu", 1, 0)])
def test_reserved_gpus_are_those_the_engine_uses(device: Any, tensor_parallel_size: int, num_gpus: int) -> None:
    with pytest.raises(ValidationError, match=f"rollout.num_gpus = {num_gpus}, but"):
        RolloutSettings(
            engine=EngineConfig(model="m", device=device, tensor_parallel_size=tensor_parallel_size),
            rollout=RolloutConfig(num_gpus=num_gpus),
            sandbox_address="localhost:1",
        )
