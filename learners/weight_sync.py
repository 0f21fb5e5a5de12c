"""The learner's side of weight sync: it publishes or broadcasts the weights after a step.

`host`: rank 0 copies all weights to numpy. They are passed as one Ray object, which engines on a node share.
`nccl`: rank 0 broadcasts to the engines' workers with vLLM's own trainer engine. Ray passes only names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from learners.engine import DeepSpeedEngine
from models.weight_update import WeightUpdate


def host_update(engine: DeepSpeedEngine) -> WeightUpdate | None:
    """An independent copy of the weights, on rank 0; None on the other ranks, which take part in gathering them."""
    payload = {}
    shapes = []
    for name, tensor in engine.published_weights():
        if engine.rank == 0:
            payload[name] = _to_numpy(tensor)
            shapes.append(tuple(tensor.shape))
    if engine.rank != 0:
        return None
    return WeightUpdate(
        policy_version=engine.policy_version,
        backend="host",
        names=tuple(payload),
        dtypes=tuple(dtype for _, dtype in payload.values()),
        shapes=tuple(shapes),
        payload=payload,
    )


def nccl_update(engine: DeepSpeedEngine) -> WeightUpdate:
    """The names, shapes and types that engines must expect from the next `NCCLBroadcast.send`."""
    tensors = engine.to_publish
    return WeightUpdate(
        policy_version=engine.policy_version,
        backend="nccl",
        names=tuple(tensor.name for tensor in tensors),
        dtypes=tuple(_dtype_name(tensor.dtype) for tensor in tensors),
        shapes=tuple(tensor.shape for tensor in tensors),
    )


class NCCLBroadcast:
    """Rank 0 and all engine workers in one NCCL group. It exists on every learner rank, as gathering needs them all.

    The controller calls the engines (their `init_weight_transfer_engine`, then `update_weights` for each update) at the same
    time as this object on the learners, so vLLM's trainer engine gets a client that does nothing.
    """

    def __init__(self, engine: DeepSpeedEngine, address: str, port: int, num_engine_workers: int) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._trainer = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                master_address=address, master_port=port, world_size=1 + num_engine_workers, rank=engine.rank
            ),
            client=_ControllerDrivesEngines(),
            source=_weight_source(engine),
        )

    def send(self) -> None:
        """Broadcast the current weights in model order. Returns when they have arrived. Collective."""
        self._trainer.send_weights()

    def close(self) -> None:
        self._trainer.shutdown()


def engine_init_info(address: str, port: int, num_engine_workers: int) -> dict[str, Any]:
    """The arguments with which each engine's `init_weight_transfer_engine` joins the group that `NCCLBroadcast` opens."""
    from vllm.distributed.weight_transfer.packed_tensor import (
        DEFAULT_PACKED_BUFFER_SIZE_BYTES,
        DEFAULT_PACKED_NUM_BUFFERS,
    )

    return {
        "master_address": address,
        "master_port": port,
        "rank_offset": 1,  # rank 0 is the only sender
        "world_size": 1 + num_engine_workers,
        "packed": True,
        "packed_buffer_size_bytes": DEFAULT_PACKED_BUFFER_SIZE_BYTES,
        "packed_num_buffers": DEFAULT_PACKED_NUM_BUFFERS,
    }


class _ControllerDrivesEngines:
    """A `VLLMWeightSyncClient` of vLLM for trainers that don't call the engines themselves."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def _weight_source(engine: DeepSpeedEngine) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(tensor.name, tensor.dtype, tensor.shape) for tensor in engine.to_publish]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in engine.published_weights():
                # vLLM packs several tensors before it sends; by then a gathered ZeRO-3 parameter is gone.
                yield name, tensor.clone() if engine.config.zero_stage == 3 else tensor

    return Source()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_numpy(tensor: Tensor) -> tuple[Any, str]:
    host = tensor.detach().to("cpu", copy=True)  # a copy, as the next step changes the weights
    bits = host.view(torch.uint16) if host.dtype == torch.bfloat16 else host
    return bits.numpy(), _dtype_name(tensor.dtype)
