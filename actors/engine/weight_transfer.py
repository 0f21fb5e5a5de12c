"""Our weight-transfer engine for vLLM, for machines without NCCL. It is loaded inside vLLM's worker processes.

vLLM looks up transfer engines in a registry of the worker's own process. Its plugin entry points belong to installed
packages, and this application installs none; a worker extension is imported by name in every worker before the model
loads, so registering at import of this module does the same.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.engine import host_weights


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """Where one update's tensors lie."""

    path: str


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads a full set of checkpoint-format weights from a safetensors file on this node."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        _have_experts_packed_anew(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        self.model.load_weights(host_weights.read(update_info.path))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to release."""


def _have_experts_packed_anew(model: torch.nn.Module) -> None:
    """On a CPU vLLM packs the weights of a mixture's experts when it has made the kernel that reads them. A reload finds a
    kernel and leaves them unpacked, so that every logprob is wrong by nats (0.32). Without a kernel it does both again."""
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None and next(layer.parameters()).device.type == "cpu":
            method.moe_kernel = None


class WorkerExtension:
    """Named in vLLM's arguments so that its workers import this module; adds no methods."""


def _die_with_parent() -> None:
    """End this process when the one that spawned it is gone.

    vLLM's core notices a dead client only when it next sends to it: after a kill −9 of the actor it would keep its memory
    and its GPU while Ray starts a successor.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # imported outside a worker
        return

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="die-with-parent", daemon=True).start()


WeightTransferEngineFactory.register_engine("host", HostWeightTransferEngine)
_die_with_parent()
