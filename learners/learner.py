"""One rank of the learner gang: a Ray actor around `DeepSpeedEngine`. Made and driven by `group.LearnerGroup`."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from learners.batching import Pair, Sample
from learners.config import LearnerConfig, LossConfig
from learners.engine import DeepSpeedEngine
from learners.weight_sync import NCCLBroadcast, host_update, nccl_update
from trajectory.weights import LogprobProbe, WeightUpdate


class Learner:
    """All methods but `address` are collective: the group calls them on every rank."""

    def __init__(self, config: LearnerConfig, loss: LossConfig, rank: int) -> None:
        self.config = config
        self.loss_config = loss
        self.rank = rank
        self.engine: DeepSpeedEngine
        self.broadcast: NCCLBroadcast | None = None

    def __repr__(self) -> str:
        return f"Learner(rank={self.rank})"

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: str, port: int) -> None:
        """Join the other ranks and load the model."""
        on_gpu = self.config.num_gpus_per_learner > 0
        if on_gpu:
            torch.cuda.set_device(0)  # Ray shows each rank only its own GPU
        else:
            torch.set_num_threads(self.config.num_cpus_per_learner)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=self.rank,
            world_size=self.config.num_learners,
            timeout=timedelta(seconds=self.config.step_timeout_s),
        )
        self.engine = DeepSpeedEngine(self.config, self.loss_config)

    def train_step(
        self, samples: Sequence[Sample], probe_ids: Sequence[int] | None
    ) -> tuple[dict[str, Any], WeightUpdate | None]:
        """One batch of policy optimization, then `publish`. Two return values, so that the weights are an object of
        their own, which goes to the engines without passing through the controller."""
        metrics = self.engine.policy_step(samples)
        with self.engine.clock("publish"):
            report, update = self.publish(probe_ids)
        return report | {"metrics": metrics, "seconds": self.engine.clock.take()}, update

    def publish(self, probe_ids: Sequence[int] | None) -> tuple[dict[str, Any], WeightUpdate | None]:
        """The current weights and what they make of `probe_ids`."""
        version = self.engine.policy_version
        probe = None
        if probe_ids is not None:
            # An inference engine's scores of a given text are at temperature 1, whatever it samples at.
            logprobs = self.engine.logprobs(probe_ids, temperature=1.0)
            probe = LogprobProbe(policy_version=version, token_ids=tuple(map(int, probe_ids)), logprobs=logprobs)
        update = host_update(self.engine) if self.config.weight_sync == "host" else nccl_update(self.engine)
        return {"policy_version": version, "probe": probe, "metrics": {}, "seconds": {}}, update

    def sft_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        return self.engine.sft_step(samples)

    def pair_step(self, pairs: Sequence[Pair]) -> dict[str, float]:
        return self.engine.pair_step(pairs)

    def scores(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        return self.engine.scores(sequences)

    def open_broadcast(self, address: str, port: int, num_engine_workers: int) -> None:
        if self.broadcast is not None:
            self.broadcast.close()  # of a group whose engines are others now
        self.broadcast = NCCLBroadcast(self.engine, address, port, num_engine_workers)

    def send_weights(self) -> None:
        assert self.broadcast is not None, "open_broadcast first"
        self.broadcast.send()

    def save(self, path: str) -> None:
        self.engine.save(path)

    def load(self, path: str) -> int:
        """Returns the policy version restored."""
        self.engine.load(path)
        return self.engine.policy_version

    def export_hf(self, path: str) -> None:
        self.engine.export_hf(path)
