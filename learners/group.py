"""The group of learner ranks as one object for the controller. Every wait has a deadline, and every failure has a name.

    group = LearnerGroup(LearnerConfig(model=…, num_learners=2), LossConfig(), probe_ids=[…])
    group.start()                               # places the ranks and loads the model
    step = group.start_step(samples)
    while (result := step.poll(0.25)) is None:
        …                                       # the controller continues with rollouts
    result.update                               # ObjectRef of the WeightUpdate, for the engines

It has the methods that RLlib calls when it saves and restores an Algorithm (its `Checkpointable`, by duck typing).
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from learners import skipped_steps
from learners.batching import Pair, Sample, check_pairs, has_gradient
from learners.config import LearnerConfig, LossConfig
from learners.environment import process_environment
from learners.errors import LearnerDied, LearnerError, LearnerOutOfMemory, LearnerTimeout, failed
from models.checksums import Checksums, WeightsDtype
from models.weight_update import LogprobProbe
from storage.objects import Storage

T = TypeVar("T")
logger = logging.getLogger(__name__)

LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
)
"""Errors by which Ray reports a rank whose process is gone."""

SLICE_S = 0.5
"""Ray's waits don't react to signals (2.60), so long ones are split into waits of this length, so that Ctrl-C works."""

ROLE_SHARE = 0.001
"""Share of the resource `learner` that a rank takes when placed by role. It is only a mark: CPUs and GPUs decide how many
ranks fit on a node."""

GRACE_S = 3.0
"""After a first failure, how long to look for a dead rank, seconds: broken connections of others may be reported earlier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The result of a step: metrics, the weights for the engines, and the reference for their logprob gate."""

    policy_version: int
    metrics: dict[str, float]
    seconds: dict[str, float]  # rank 0's time, by phase
    update: (
        ray.ObjectRef
    )  # of a WeightUpdate, or of None after a skipped step. The caller owns it, so it outlives the learners
    probe: LogprobProbe | None  # None if the group has no probe_ids, or the step was skipped
    checksums: Checksums | None  # of `update`; None after a skipped step

    @property
    def applied(self) -> bool:
        """Whether the weights changed. False after a skipped step (see `skipped_steps`), and for a `publish`."""
        return skipped_steps.was_applied(self.metrics)


class Pending(Generic[T]):
    """A call on which all ranks are working."""

    def __init__(self, group: LearnerGroup, what: str, refs: list[Any], timeout_s: float, convert: Callable[[], T]):
        self._group, self._what, self._convert = group, what, convert
        self._waiting = {ref: rank for rank, ref in enumerate(refs)}
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    @property
    def refs(self) -> list[Any]:
        """The references for which the call still waits, so that a caller can wait for other things at the same time."""
        return list(self._waiting)

    def poll(self, timeout_s: float = 0.0) -> T | None:
        """The result if it comes within `timeout_s`, else None.

        Raises:
            LearnerError: a rank died, raised or missed the deadline. All ranks have then been stopped.
        """
        until = min(time.monotonic() + timeout_s, self._deadline)
        while self._waiting:
            done, _ = ray.wait(
                list(self._waiting), num_returns=1, timeout=max(until - time.monotonic(), 0.0), fetch_local=False
            )
            for ref in done:
                try:
                    ray.get(ref, timeout=GRACE_S)
                except Exception as e:
                    raise self._group._failed(self._what, self._waiting, ref, e) from e
                del self._waiting[ref]
            if not done and self._waiting:
                if time.monotonic() >= self._deadline:
                    self._group._abandon()
                    ranks = sorted(self._waiting.values())
                    raise LearnerTimeout(f"{self._what}: no answer from ranks {ranks} within {self._timeout_s:.3g} s")
                return None
        return self._convert()

    def result(self) -> T:
        """Wait until the call's deadline. Raises as `poll` does."""
        while True:
            value = self.poll(SLICE_S)
            if value is not None:
                return value


class LearnerGroup:
    """`num_learners` ranks on a placement group. Call `start` first; it needs `ray.init` to have been called."""

    def __init__(
        self,
        config: LearnerConfig,
        loss: LossConfig | None = None,
        *,
        probe_ids: Sequence[int] | None = None,
        publish_as: WeightsDtype | Literal["auto"] | None = None,
    ) -> None:
        """`probe_ids`: a text for the engines' gate, or None if no engine will use the weights. `publish_as`: the dtype in
        which engines hold them, for which checksums are computed. None: that of the learner. `auto`: what vLLM chooses on a
        GPU, float16 for a checkpoint in it, else bfloat16."""
        self.config = config
        self.loss_config = loss or LossConfig()
        config.check_loss(self.loss_config)
        self.probe_ids = None if probe_ids is None else tuple(probe_ids)
        self.publish_as: WeightsDtype | Literal["auto"] = publish_as or (
            "bfloat16" if config.in_bfloat16 else "float32"
        )
        self.policy_version = 0
        self.notes: tuple[str, ...] = ()  # sentences that tell a user how this model is computed
        self._ranks: list[Any] = []
        self._placement: PlacementGroup | None = None

    # -- training ------------------------------------------------------------------------------------------------

    def start_step(self, samples: Sequence[Sample]) -> Pending[StepResult]:
        """Start to train on one batch and to publish the weights, without waiting for the result.

        Raises:
            ValueError: no sample has a gradient. The ranks keep running.
        """
        self.config.check_call("policy_step")
        if not any(has_gradient(sample, with_kl=self.loss_config.kl_coef > 0) for sample in samples):
            raise ValueError(f"none of the {len(samples)} samples has a gradient: there is nothing to train on")
        return self._start_published("train_step", ray.put(list(samples)), self.probe_ids)

    def publish(self) -> StepResult:
        """Publish the current weights without training, for engines that start or come back. `metrics` is empty."""
        self.config.check_call("publish")
        return self._start_published("publish", self.probe_ids).result()

    def sft_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One supervised optimizer step; returns its metrics, or why it was skipped (`skipped_steps`)."""
        self.config.check_call("sft_step")
        metrics: dict[str, float] = self._call("sft_step", ray.put(list(samples)))
        return metrics

    def pair_step(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """One Bradley–Terry optimizer step on preference pairs, with head="scalar"; returns its metrics, or why it was
        skipped.

        Raises:
            ValueError: a pair has equal or empty sides (the message names it), or another head. The ranks keep running.
        """
        self.config.check_call("pair_step")
        check_pairs(pairs)
        metrics: dict[str, float] = self._call("pair_step", ray.put(list(pairs)))
        return metrics

    def scores(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """(N,) scores of whole token sequences, in their order, with head="scalar"."""
        self.config.check_call("scores")
        if not len(sequences):
            return np.zeros(0, np.float32)
        found: NDArray[np.float32] = self._call("scores", ray.put(list(sequences)))
        return found

    # -- NCCL weight sync ----------------------------------------------------------------------------------------

    def open_broadcast(self, num_engine_workers: int) -> tuple[dict[str, Any], Pending[bool]]:
        """Begin to open the NCCL group. Pass the first value to every engine's `init_weight_transfer_engine`, then wait for
        the second, since both sides must be in the same call."""
        from learners.weight_sync import engine_init_info

        address, port = self._rendezvous(self.config.start_timeout_s)
        refs = self._refs("open_broadcast", address, port, num_engine_workers)
        pending = Pending(self, "open_broadcast", refs, self.config.start_timeout_s, lambda: True)
        return engine_init_info(address, port, num_engine_workers), pending

    def broadcast(self) -> Pending[bool]:
        """Send the current weights to the engines, which must be receiving at the same time."""
        refs = self._refs("send_weights")
        return Pending(self, "send_weights", refs, self.config.step_timeout_s, lambda: True)

    # -- state ---------------------------------------------------------------------------------------------------

    def export_hf(self, path: str | Path | Storage) -> None:
        """Write a Hugging Face model directory. Rank 0 does it, on its node or to storage."""
        self._call("export_hf", _place(path))

    def save_to_path(self, path: str | Path | Storage, *, filesystem: Any = None, **_: Any) -> str:
        """Write a checkpoint below `path`, which all ranks' nodes must share, or to storage, where each rank writes its
        part."""
        if filesystem is not None and filesystem.type_name != "local":
            raise ValueError(f"learners write to mounted file systems or a Storage, not to {filesystem.type_name!r}")
        self._call("save", _place(path))
        return str(path)

    def restore_from_path(self, path: str | Path | Storage, **_: Any) -> None:
        """Load a checkpoint, from any number of ranks that wrote it."""
        self.policy_version = self._call("load", _place(path))

    def get_state(
        self, components: Collection[str] | str | None = None, *, not_components: Any = None, **_: Any
    ) -> dict[str, Any]:
        """Returns nothing: the state is sharded over the ranks, which write it to disk, see `save_to_path`."""
        return {"learner": {}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Does nothing, see `get_state`."""

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.config, self.loss_config), {"probe_ids": self.probe_ids, "publish_as": self.publish_as}

    def get_metadata(self) -> dict[str, Any]:
        return {"policy_version": self.policy_version}

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        return []

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether there are ranks to call; False after an error or `shutdown`."""
        return bool(self._ranks)

    def recreate(self, checkpoint: str | Path | Storage | None = None) -> None:
        """Replace all ranks by new ones, restored from `checkpoint` or, without one, from the model."""
        self.shutdown()
        self.policy_version = 0
        self.start()
        if checkpoint is not None:
            self.restore_from_path(checkpoint)

    def shutdown(self) -> None:
        """End all ranks and release their resources. May be called twice."""
        self._abandon()
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    def start(self) -> None:
        """Place the ranks, start them and load the model. Waits until this is done.

        Raises:
            LearnerError: this was not done within `start_timeout_s`.
        """
        try:
            self._place_and_load()
        except BaseException:
            self.shutdown()  # otherwise a placement group without an owner keeps the resources reserved
            raise

    def _place_and_load(self) -> None:
        config = self.config
        bundle: dict[str, float] = {"CPU": config.num_cpus_per_learner}
        if config.num_gpus_per_learner:
            bundle["GPU"] = config.num_gpus_per_learner
        if config.place_by_role:
            bundle["learner"] = ROLE_SHARE
        start = time.monotonic()
        # A Tune trial has reserved resources for all that it starts, ranks too. A second reservation would wait for room.
        captured = ray.get_runtime_context().should_capture_child_tasks_in_placement_group
        reserved = get_current_placement_group() if captured else None
        if reserved is None:
            self._reserve(bundle, start + config.start_timeout_s)
        # This import is half of all that a driver needs. It is needed only here, while the engines already start.
        from learners.learner import Learner

        actor = ray.remote(Learner)
        role = "reward-model-learner" if config.head == "scalar" else "learner"
        suffix = uuid.uuid4().hex[:6]  # Ray frees a dead actor's name late, so the next ranks need other names
        self._ranks = [
            actor.options(
                name=f"{role}-{rank}-{suffix}",
                num_cpus=config.num_cpus_per_learner,
                num_gpus=config.num_gpus_per_learner,
                max_restarts=0,  # a single rank can't rejoin its process group, so all ranks are replaced together
                resources={"learner": ROLE_SHARE} if config.place_by_role else None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    reserved or self._placement, placement_group_bundle_index=-1 if reserved else rank
                ),
                runtime_env={"env_vars": process_environment(config)},
            ).remote(config, self.loss_config, rank)
            for rank in range(config.num_learners)
        ]
        left = config.start_timeout_s - (time.monotonic() - start)
        address, port = self._rendezvous(left)
        left = config.start_timeout_s - (time.monotonic() - start)
        refs = self._refs("start", address, port, self.publish_as, self.probe_ids is not None)
        notes = Pending(self, "start", refs, left, lambda: (ray.get(refs[0]),)).result()[0]
        for note in notes:
            if note not in self.notes:  # after a restart, the new ranks report the same notes
                logger.warning(note)
        self.notes = notes

    def _reserve(self, bundle: dict[str, float], deadline: float) -> None:
        config = self.config
        placement = placement_group([bundle] * config.num_learners, strategy=config.placement_strategy)
        self._placement = placement  # at once, so that `shutdown` releases it
        while not placement.wait(SLICE_S):
            if time.monotonic() >= deadline:
                raise LearnerTimeout(
                    f"no room for {config.num_learners} learners of {bundle} within {config.start_timeout_s:g} s; "
                    f"free in the cluster: {ray.available_resources()}"
                )

    def _rendezvous(self, timeout_s: float) -> tuple[str, int]:
        """An address and port at which a process group can be opened whose first member is rank 0."""
        self._check_alive("address")
        ref = self._ranks[0].address.remote()
        found: tuple[str, int] = Pending(self, "address", [ref], timeout_s, lambda: ray.get(ref)).result()
        return found

    def _check_alive(self, what: str) -> None:
        if not self._ranks:
            raise LearnerError(f"{what}: the learners are not up; call start(), or recreate() after a failure")

    def _refs(self, method: str, *args: Any) -> list[Any]:
        self._check_alive(method)
        return [getattr(rank, method).remote(*args) for rank in self._ranks]

    def _call(self, method: str, *args: Any) -> Any:
        """Run a collective on all ranks and return rank 0's answer."""
        refs = self._refs(method, *args)
        # In a tuple, as a rank may answer None, which `poll` uses for "not yet".
        return Pending(self, method, refs, self.config.step_timeout_s, lambda: (ray.get(refs[0]),)).result()[0]

    def _start_published(self, method: str, *args: Any) -> Pending[StepResult]:
        self._check_alive(method)
        pairs = [getattr(rank, method).options(num_returns=2).remote(*args) for rank in self._ranks]
        report, update = pairs[0]

        def convert() -> StepResult:
            answer = ray.get(report)
            self.policy_version = answer["policy_version"]
            return StepResult(update=update, **answer)

        return Pending(self, method, [pair[0] for pair in pairs], self.config.step_timeout_s, convert)

    def _failed(self, what: str, waiting: dict[Any, int], ref: Any, error: Exception) -> LearnerError:
        """Find the cause among the ranks, stop all ranks and return the error to raise."""
        errors = {waiting[ref]: error}
        pending = [r for r in waiting if r != ref]
        until = time.monotonic() + GRACE_S
        while pending and not any(isinstance(e, LOST) for e in errors.values()):
            done, pending = ray.wait(
                pending, num_returns=1, timeout=max(until - time.monotonic(), 0.0), fetch_local=False
            )
            if not done:
                break
            for other in done:
                try:
                    ray.get(other, timeout=GRACE_S)
                except Exception as e:  # kept, as it may be the cause
                    errors[waiting[other]] = e
        self._abandon()
        of = f"of {self.config.num_learners}"
        for rank, found in errors.items():
            if isinstance(found, ray.exceptions.OutOfMemoryError):
                return LearnerOutOfMemory(f"{what}: Ray's memory monitor ended rank {rank} {of}")
        for rank, found in errors.items():
            if isinstance(found, LOST):
                return LearnerDied(f"{what}: rank {rank} {of} died")
        rank, first = next(iter(errors.items()))
        cause = getattr(first, "cause", None) or first
        return failed(what, rank, cause)

    def _abandon(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ValueError):  # Ray was shut down meanwhile
                ray.kill(rank)
        self._ranks = []


def _place(path: str | Path | Storage) -> str | Storage:
    return path if isinstance(path, Storage) else str(Path(path).absolute())
