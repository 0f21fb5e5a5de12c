"""Our weight-transfer engine for vLLM, for machines without NCCL. It is loaded inside vLLM's worker processes.

vLLM finds transfer engines in a registry of the worker's own process. vLLM's plugin entry points need an installed package,
and this application installs none. But a worker extension is imported by name in every worker before the model is loaded, so
it is enough to register the engine when this module is imported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.engine import adapter, host_weights
from actors.engine.held_weights import HeldWeights
from actors.engine.processes import end_with_parent
from models.checksums import PieceSum


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Empty, as there is nothing to agree on beforehand."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """The place of one update's tensors."""

    path: str


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads a full set of checkpoint-format weights from a safetensors file on this node."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        """Does nothing, as there is no connection."""

    def start_weight_update(self) -> None:
        _have_experts_packed_anew(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        self.model.load_weights(host_weights.read(update_info.path))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _pack_tied_layers_anew(self.model)

    def shutdown(self) -> None:
        """Does nothing, as there is nothing to release."""


def _have_experts_packed_anew(model: torch.nn.Module) -> None:
    """On a CPU, vLLM packs the weights of a mixture's experts after it has made the kernel that reads them. When it reloads,
    the kernel exists and the weights stay unpacked, so that every logprob is wrong by nats (0.32). Without the old kernel it
    does both again."""
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None and next(layer.parameters()).device.type == "cpu":
            method.moe_kernel = None


def _pack_tied_layers_anew(model: torch.nn.Module) -> None:
    """On a CPU, vLLM packs a layer's weight again when the layer is loaded. A reload loads only the first of the layers that
    share a weight: the input embedding, and not the output layer that is tied to it, whose kernel would go on with the old
    weight (0.32)."""
    sharing: dict[int, list[Any]] = defaultdict(list)
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "quant_method") and weight is not None and weight.numel() and weight.device.type == "cpu":
            sharing[weight.data_ptr()].append(layer)
    for layers in sharing.values():
        if len(layers) > 1:
            for layer in layers:
                layer.quant_method.process_weights_after_loading(layer)


class WorkerExtension:
    """vLLM's arguments name this class so that its workers import this module. Its methods become the workers' own."""

    model_runner: Any  # the worker's
    held_weights: HeldWeights

    def locate_weights(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Find where this worker holds the tensors of its checkpoint, which are given by name and shape."""
        self.held_weights = HeldWeights(
            self.model_runner.get_model(),
            shapes,
            rank=get_tensor_model_parallel_rank(),
            size=get_tensor_model_parallel_world_size(),
            dtype=self.model_runner.model_config.dtype,
        )

    def held_sums(self, names: Sequence[str]) -> dict[str, PieceSum | str]:
        """See `HeldWeights.sums`."""
        return self.held_weights.sums(names)

    def hold_zero_adapter(self) -> None:
        """See `adapter.hold_zero_adapter`."""
        adapter.hold_zero_adapter(self.model_runner.get_model(), self.model_runner.lora_manager)

    def held_adapter_sums(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, PieceSum | str]:
        """See `adapter.held_sums`."""
        return adapter.held_sums(
            self.model_runner.get_model(),
            shapes,
            rank=get_tensor_model_parallel_rank(),
            size=get_tensor_model_parallel_world_size(),
            dtype=self.model_runner.model_config.dtype,
        )


WeightTransferEngineFactory.register_engine("host", HostWeightTransferEngine)
end_with_parent()
