"""One learner rank: a Ray actor around `DeepSpeedEngine`. `group.LearnerGroup` makes it and calls it."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from learners import skipped_steps
from learners.batching import Pair, Sample
from learners.checkpoint_format import META_FILE
from learners.config import LearnerConfig, LossConfig
from learners.engine import DeepSpeedEngine
from learners.published_sums import PublishedSums
from learners.weight_sync import HostMemory, NCCLBroadcast, adapter_update, host_update, nccl_update
from models.checksums import WeightsDtype
from models.on_disk import is_half_precision
from models.weight_update import LogprobProbe, WeightUpdate
from storage.locations import local_path
from storage.objects import Storage, fetch, files_of, scratch


class Learner:
    """All methods except `address` are collective: the group calls them on every rank."""

    def __init__(self, config: LearnerConfig, loss: LossConfig, rank: int) -> None:
        self.config = config
        self.loss_config = loss
        self.rank = rank
        self.engine: DeepSpeedEngine
        self.broadcast: NCCLBroadcast | None = None
        self._host_memory = HostMemory()
        self._sums: PublishedSums  # made by `start`

    def __repr__(self) -> str:
        return f"Learner(rank={self.rank})"

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free at present."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(
        self, address: str, port: int, publish_as: WeightsDtype | Literal["auto"], for_engines: bool
    ) -> tuple[str, ...]:
        """Join the other ranks and load the model; returns the engine's notes. `publish_as`: see `LearnerGroup`.
        `for_engines`: whether engines will use its weights, so that they must be able to.

        Raises ValueError for a model that can't be trained with these settings."""
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
        # Each node needs its own copy of a model at a URI.
        self.engine = DeepSpeedEngine(
            self.config.model_copy(update={"model": fetch(self.config.model)}), self.loss_config
        )
        if for_engines and self.config.weight_sync != "adapter":  # with adapters engines keep the checkpoint's weights
            self.engine.check_published()
        if publish_as == "auto":
            publish_as = "float16" if is_half_precision(self.engine.config.model) else "bfloat16"
        self._sums = PublishedSums(publish_as)
        return self.engine.notes

    def train_step(
        self, samples: Sequence[Sample], probe_ids: Sequence[int] | None
    ) -> tuple[dict[str, Any], WeightUpdate | None]:
        """Train on one batch of policy optimization, then `publish`, unless the batch was skipped and nothing is new. There
        are two return values so that the weights are an object of their own, which goes to the engines without passing
        through the controller."""
        metrics = self.engine.policy_step(samples)
        if not skipped_steps.was_applied(metrics):
            report, update = {"policy_version": self.engine.policy_version, "probe": None, "checksums": None}, None
        else:
            with self.engine.clock("publish"):
                report, update = self.publish(probe_ids)
        return report | {"metrics": metrics, "seconds": self.engine.clock.take()}, update

    def publish(self, probe_ids: Sequence[int] | None) -> tuple[dict[str, Any], WeightUpdate | None]:
        """The current weights and their logprobs of `probe_ids`."""
        version = self.engine.policy_version
        probe = None
        if probe_ids is not None:
            # An inference engine scores a given text at temperature 1, whatever its sampling temperature is.
            logprobs = self.engine.logprobs(probe_ids, temperature=1.0)
            probe = LogprobProbe(policy_version=version, token_ids=tuple(map(int, probe_ids)), logprobs=logprobs)
        update: WeightUpdate | None
        if self.config.weight_sync == "nccl":
            update = nccl_update(self.engine, self._sums)
        else:
            copied = adapter_update if self.config.weight_sync == "adapter" else host_update
            update = copied(self.engine, self._host_memory, self._sums)
        checksums = self._sums.finish(version) if self.rank == 0 else None
        return {
            "policy_version": version,
            "probe": probe,
            "checksums": checksums,
            "metrics": {},
            "seconds": {},
        }, update

    def sft_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        return self.engine.sft_step(samples)

    def pair_step(self, pairs: Sequence[Pair]) -> dict[str, float]:
        return self.engine.pair_step(pairs)

    def scores(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        return self.engine.scores(sequences)

    def open_broadcast(self, address: str, port: int, num_engine_workers: int) -> None:
        if self.broadcast is not None:
            self.broadcast.close()  # its group had other engines
        self.broadcast = NCCLBroadcast(self.engine, address, port, num_engine_workers)

    def send_weights(self) -> None:
        assert self.broadcast is not None, "open_broadcast first"
        self.broadcast.send()

    def save(self, place: str | Storage) -> None:
        """Save to a path that all ranks share. Or each rank saves its own part to storage, by way of its node's disk."""
        if isinstance(place, str):
            self.engine.save(place)
            return
        with scratch() as folder:
            self.engine.save(folder)
            place.upload(folder, [name for name in files_of(folder) if name != META_FILE])
            dist.barrier()
            if self.rank == 0:  # as on disk, it is written when all ranks' shards are there
                place.upload(folder, [META_FILE])

    def load(self, place: str | Storage) -> int:
        """Load a checkpoint; returns the policy version that was restored."""
        if isinstance(place, str):
            self.engine.load(place)
        else:
            self._load_copy(place)
        return self.engine.policy_version

    def _load_copy(self, storage: Storage) -> None:
        """Load from storage. The first of the ranks on the same disk fetches the checkpoint and keeps it while it is
        read."""
        copy = local_path(storage.uri)
        disks = [""] * self.engine.world_size
        dist.all_gather_object(disks, f"{socket.gethostname()}:{copy}")
        leads = disks.index(disks[self.rank]) == self.rank
        if leads:
            fetch(storage.uri, retry_s=storage.retry_s)
        dist.barrier()
        self.engine.load(copy, leads=leads)
        dist.barrier()
        if leads:
            shutil.rmtree(copy, ignore_errors=True)

    def export_hf(self, place: str | Storage) -> None:
        if isinstance(place, str):
            self.engine.export_hf(place)
            return
        with scratch() as folder:
            self.engine.export_hf(folder / "model")
            if self.rank == 0:
                place.clear()
                # Without its config.json it doesn't count as a model.
                place.upload(folder / "model", files_of(folder / "model"), last=["config.json"])
