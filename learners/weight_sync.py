"""The learner's side of weight sync: it publishes or broadcasts the weights after a step.

`host`: rank 0 copies all weights to its host. They are passed as one Ray object, which engines on a node share.
`adapter`: the same with only the adapters, which are a hundredth of the weights or less.
`nccl`: rank 0 broadcasts to the engines' workers with vLLM's own trainer engine. Ray passes only names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from learners.config import PACKED_BUFFER_BYTES
from learners.engine import DeepSpeedEngine
from learners.published_sums import PublishedSums
from models.weight_update import WeightUpdate

BLOCK_BYTES = 1 << 30
ALIGNMENT = 64
"""Alignment of each tensor in a block, bytes."""


class HostMemory:
    """Where the weights are copied to on the host. It is taken at the first copy and overwritten by each later one.

    Taking fresh memory costs far more than the copy: of a 7B model on an H100, 15 GB into fresh memory took 10 s, and into
    pinned memory that is there 0.3 s. PyTorch rounds pinned memory up to a power of two, so it is taken in large blocks.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0  # bytes of the block

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` on the host, overwritten by the next copy of that name. On a GPU it arrives in stream order."""
        if name not in self._tensors:
            self._tensors[name] = self._take(tensor)
        return self._tensors[name].copy_(tensor.detach(), non_blocking=True)

    def _take(self, tensor: Tensor) -> Tensor:
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + tensor.nbytes > len(self._block):
            size = 1 << (max(tensor.nbytes, BLOCK_BYTES) - 1).bit_length()
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda)
            start = 0
        self._used = start + tensor.nbytes
        return self._block[start : self._used].view(tensor.dtype).view(tensor.shape)


def host_update(engine: DeepSpeedEngine, memory: HostMemory, sums: PublishedSums | None = None) -> WeightUpdate | None:
    """The weights in `memory`, valid until its next use, on rank 0; None on the other ranks, which take part in gathering.
    `sums` gets every tensor on its way.

    An actor that returns it has it copied into Ray's object store before its next method runs."""
    if sums is not None:
        sums.begin(engine.to_publish)
    return _update(engine, "host", engine.published_weights(), memory, sums)


def adapter_update(engine: DeepSpeedEngine, memory: HostMemory, sums: PublishedSums) -> WeightUpdate | None:
    """As `host_update`, with only the adapters, in the dtype of `sums`, which is the engine's."""
    sums.begin(engine.adapter_to_publish(sums.dtype))
    return _update(engine, "adapter", engine.published_adapter(sums.dtype), memory, sums)


def _update(
    engine: DeepSpeedEngine,
    backend: Literal["host", "adapter"],
    tensors: Iterator[tuple[str, Tensor]],
    memory: HostMemory,
    sums: PublishedSums | None,
) -> WeightUpdate | None:
    copies = {}
    for name, tensor in tensors:
        if engine.rank == 0:
            copies[name] = memory.copy(name, tensor)
            if sums is not None:
                sums.add(name, tensor)
    if engine.rank != 0:
        return None
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return WeightUpdate(
        policy_version=engine.policy_version,
        backend=backend,
        names=tuple(copies),
        dtypes=tuple(_dtype_name(copy.dtype) for copy in copies.values()),
        shapes=tuple(tuple(copy.shape) for copy in copies.values()),
        payload={name: _to_numpy(copy) for name, copy in copies.items()},
    )


def nccl_update(engine: DeepSpeedEngine, sums: PublishedSums | None = None) -> WeightUpdate:
    """The names, shapes and types that engines must expect from the next `NCCLBroadcast.send`. With `sums`, which gets
    every tensor on rank 0, it is collective: with ZeRO-3 all ranks gather."""
    tensors = engine.to_publish
    if sums is not None:
        sums.begin(tensors)
        for name, tensor in engine.published_weights():
            if engine.rank == 0:
                sums.add(name, tensor)
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
                master_address=address,
                master_port=port,
                world_size=1 + num_engine_workers,
                rank=engine.rank,
                packed_buffer_size_bytes=PACKED_BUFFER_BYTES,
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
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_NUM_BUFFERS

    return {
        "master_address": address,
        "master_port": port,
        "rank_offset": 1,  # rank 0 is the only sender
        "world_size": 1 + num_engine_workers,
        "packed": True,
        "packed_buffer_size_bytes": PACKED_BUFFER_BYTES,
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


def _to_numpy(copy: Tensor) -> tuple[Any, str]:
    bits = copy.view(torch.uint16) if copy.dtype == torch.bfloat16 else copy
    return bits.numpy(), _dtype_name(copy.dtype)
