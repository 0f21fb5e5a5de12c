"""Repair during GRPO: bad trajectories become preference pairs, and the reward model follows the policy.

    scored group ──offer──▶ requests ──repairers──▶ accepted repair + original = pair ──every K steps──▶ refresh
                                                                                                            │
    next groups' scores ◀── version + 1 ◀── RewardModelService.replace ◀── export ◀── pair_step … ◀─────────┘

Nothing here delays the loop. If the repairers are busy, a group is not repaired, but counted; a refresh runs in a thread, on
learners of its own. Repaired tokens are never trained on by policy gradient, as the policy did not sample them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter, deque
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.exceptions import RayError

from actors.repair.types import RepairRequest, RepairResult
from actors.work import Work
from autotraj.config.run import RunConfig
from autotraj.errors import RunError
from autotraj.loop.refreshed_models import RefreshedModels
from autotraj.loop.reward_service import RewardModelService
from autotraj.preferences import requests as repair_requests
from autotraj.preferences.pairs import pair_accuracy
from autotraj.run_folder.location import RunLocation
from autotraj.runners.calls import CallResult, Failed
from autotraj.runners.pool import RunnerPool
from autotraj.training.skips import Skips
from autotraj.training.supervised import export
from learners.batching import Pair
from learners.config import LearnerConfig
from learners.errors import LearnerError
from learners.group import LearnerGroup
from storage.objects import StorageError
from trajectory.records import preference_record
from trajectory.reward_input import reward_input
from trajectory.types import Group

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refreshed:
    """The result of a refresh."""

    path: str
    version: int
    num_pairs: int
    accuracy_before: float  # on pairs that the model had not seen; it shows how far the model was behind the policy
    num_skipped: int  # steps whose loss or gradient was not finite


class _Undone(Exception):
    """The run was set back during this refresh."""


class OnlineRepair:
    """Online repair. The loop's thread owns it; only `_refresh` runs in another thread."""

    def __init__(
        self, config: RunConfig, repairers: RunnerPool, service: RewardModelService, models: RefreshedModels
    ) -> None:
        self._config = config
        self._settings = config.online_repair
        self._repairers = repairers
        self._service = service
        self._models = models
        self._pinned: set[int] = set()
        self._pairs: deque[Pair] = deque(maxlen=self._settings.num_pairs)
        self._num_new = 0  # pairs since the last refresh
        self._requests: dict[str, list[RepairRequest]] = {}
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._accuracy_before: float | None = None
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="refresh")
        self._refreshing: futures.Future[Refreshed] | None = None
        self._lock = threading.Lock()  # for the two below, and for giving the service a model
        self._num_set_backs = 0
        self._trainer: LearnerGroup | None = None
        folder = RunLocation.of(config, "online_repair").path
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "pairs.jsonl").open("a", buffering=1)

    # --- repairs ----------------------------------------------------------------------------------------------------

    def offer(self, group: Group) -> None:
        """Give the worst trajectories of a scored group to a repairer, if one is free."""
        requests = list(repair_requests.assess(group, self._config.quality).requests)
        if not requests:
            self._counts["groups_good"] += 1
            return
        runner_id = self._repairers.idle_slot()
        if runner_id is None or self._repairers.num_in_flight(Work.REPAIR) >= self._settings.max_in_flight:
            self._counts["groups_passed"] += 1
            return
        requests.sort(key=lambda request: (request.correct, request.quality.score))
        chosen = requests[: self._settings.max_per_group]
        self._requests[group.lease_id] = chosen
        self._counts["groups_offered"] += 1
        self._repairers.submit(
            runner_id,
            group.lease_id,
            Work.REPAIR,
            timeout_s=repair_requests.timeout_s(self._config, len(chosen)),
            requests=chosen,
            seed=repair_requests.seed_of(self._config.seed, group.task, self._counts["groups_offered"]),
        )

    def take(self, outcome: CallResult) -> None:
        """Handle the result of a group's repairs."""
        requests = self._requests.pop(outcome.key)
        if isinstance(outcome, Failed):
            self._reasons[outcome.reason] += len(requests)
            return
        results: list[RepairResult] = outcome.value
        for request, result in zip(requests, results, strict=True):
            self._reasons.update(attempt.reason for attempt in result.attempts if attempt.reason)
            if result.accepted is None:
                self._counts["hard"] += 1
                continue
            self._add(request, result)

    def _add(self, request: RepairRequest, result: RepairResult) -> None:
        assert result.accepted is not None
        mask_results = self._config.scorer.mask_results
        pair = Pair(
            chosen=reward_input(result.accepted, mask_results=mask_results),
            rejected=reward_input(request.trajectory, mask_results=mask_results),
            margin=self._config.reward_model.margin,
        )
        if np.array_equal(pair.chosen, pair.rejected) or len(pair) > self._config.learner.micro_batch_capacity:
            self._counts["pairs_unusable"] += 1
            return
        self._pairs.append(pair)
        self._num_new += 1
        self._counts["repaired"] += 1
        record = preference_record(
            request.task.question,
            result.accepted.text,
            request.trajectory.text,
            self._config.episode.system_prompt,
            task_id=request.task.id,
        )
        self._file.write(json.dumps(record) + "\n")

    # --- refreshes --------------------------------------------------------------------------------------------------

    def on_step(self, step: int) -> None:
        """Begin a refresh every `refresh_every` policy steps, and handle one that ended."""
        if self._refreshing is not None and self._refreshing.done():
            self._finish_refresh(self._refreshing)
            self._refreshing = None
        due = step % self._settings.refresh_every == 0
        if not due or self._refreshing is not None:
            return
        if self._num_new < self._settings.min_pairs:
            self._counts["refreshes_put_off"] += 1
            return
        pairs, num_new, self._num_new = list(self._pairs), self._num_new, 0
        self._refreshing = self._thread.submit(self._refresh, pairs, min(num_new, len(pairs)), self._num_set_backs)

    def _finish_refresh(self, future: futures.Future[Refreshed]) -> None:
        try:
            done = future.result()
        except (LearnerError, RunError, StorageError, RayError) as error:
            # The loop continues with the present model. The metrics show that its version doesn't rise.
            logger.warning("refreshing the reward model failed: %s", str(error).splitlines()[0])
            self._counts["refreshes_failed"] += 1
            return
        self._counts["refreshes"] += 1
        self._counts["refresh_steps_skipped"] += done.num_skipped
        self._accuracy_before = done.accuracy_before
        try:
            self._models.prune(serving=self._service.version, pinned=self._pinned)
        except (OSError, StorageError) as error:
            logger.warning("old reward models could not be removed, the next refresh tries again: %s", error)

    def _refresh(self, pairs: list[Pair], num_new: int, num_set_backs: int) -> Refreshed:
        """In a thread: train on the pairs once, in order, export the model, and give it to the service.

        After a failure, the next refresh starts new learners from the served model, since these may be half-trained."""
        trainer = self._ready_trainer(num_set_backs)
        try:
            return self._train(trainer, pairs, num_new, num_set_backs)
        except BaseException:
            trainer.shutdown()
            raise

    def _train(self, trainer: LearnerGroup, pairs: list[Pair], num_new: int, num_set_backs: int) -> Refreshed:
        new = pairs[-num_new:]
        scores = trainer.scores([pair.chosen for pair in new] + [pair.rejected for pair in new])
        before = pair_accuracy(scores[: len(new)], scores[len(new) :]).accuracy
        size = self._config.reward_model.batch_pairs
        starts = range(0, len(pairs), size)
        skips = Skips(len(starts))
        for start in starts:
            skips.took(trainer.pair_step(pairs[start : start + size]))
        version = self._service.version + 1
        export(trainer, self._models.place(version))
        path = self._models.location(version)
        with self._lock:
            self._check(num_set_backs)
            self._service.replace(path, version)
        return Refreshed(path, version, len(pairs), before, skips.num_skipped)

    def _check(self, num_set_backs: int) -> None:
        if num_set_backs != self._num_set_backs:
            raise _Undone

    def _ready_trainer(self, num_set_backs: int) -> LearnerGroup:
        """Learners with the served model, or with what they have trained it to since."""
        with self._lock:
            self._check(num_set_backs)
            if self._trainer is not None and self._trainer.alive:
                return self._trainer
            changes = {
                "model": self._service.served.path,
                "head": "scalar",
                "lr": self._settings.lr,
                "lora": self._config.reward_model.lora,
                "schedule": "constant",
                "warmup_steps": 0,
                "total_steps": None,
                "num_minibatches": 1,
                "weight_sync": "host",
            }
            trainer = LearnerGroup(LearnerConfig.model_validate(self._config.learner.model_dump() | changes))
            self._trainer = trainer
        trainer.start()
        return trainer

    # --- what the loop reports and keeps ----------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        return {
            **{f"repair/{name}": float(count) for name, count in self._counts.items()},
            **{f"repair/failed/{reason}": float(count) for reason, count in self._reasons.items()},
            "repair/pairs": float(len(self._pairs)),
            **({} if self._accuracy_before is None else {"repair/accuracy_before_refresh": self._accuracy_before}),
        }

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: the newest pairs. The scorer stores which model scores."""
        return {
            "pairs": [[p.chosen.tolist(), p.rejected.tolist(), p.margin] for p in self._pairs],
            "num_new": self._num_new,
            "counts": dict(self._counts),
            "reasons": dict(self._reasons),
        }

    def pin(self) -> None:
        """Keep the served model as long as this object lives, as a checkpoint outside of the run's folder names it."""
        self._pinned.add(self._service.version)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore a state (None: that of the start). Whatever has begun since then is cancelled: repairs, and a refresh,
        which could otherwise give the service a newer model. Waits at most while the service loads a model."""
        with self._lock:
            self._num_set_backs += 1
            trainer, self._trainer = self._trainer, None  # it has the weights of later refreshes
        if trainer is not None:
            trainer.shutdown()
        self._refreshing = None
        self._repairers.forget(Work.REPAIR)
        self._requests.clear()
        self._accuracy_before = None
        state = state or {"pairs": [], "num_new": 0, "counts": {}, "reasons": {}}
        self._pairs.clear()
        self._pairs.extend(
            Pair(chosen=np.array(c, np.int32), rejected=np.array(r, np.int32), margin=m) for c, r, m in state["pairs"]
        )
        self._num_new = state["num_new"]
        self._counts, self._reasons = Counter(state["counts"]), Counter(state["reasons"])

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._trainer is not None:
            self._trainer.shutdown()
        self._file.close()
