"""Adds rollout actors and dismisses them as the work requires, and records the reasons.

If the cluster has no room for a new actor, Ray's autoscaler adds a machine. The actor takes the newest weights before it
gets work. A dismissed actor finishes its groups. If an actor is lost with its machine, its groups go back to the ledger, as
for any dead runner, and it is requested again if there is still work for it.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from ray.rllib.env.env_runner_group import EnvRunnerGroup

from autotraj.runners.pool import RunnerPool
from cluster.config import ElasticConfig
from cluster.elastic import Decision, LoadMeter, Window

logger = logging.getLogger(__name__)


class ElasticRunners:
    """Carries out `cluster.elastic.decide` on a running pool, between two steps. Decisions go to `elastic.jsonl`."""

    def __init__(self, config: ElasticConfig, group: EnvRunnerGroup, runners: RunnerPool, folder: Path) -> None:
        self._config, self._group, self._runners = config, group, runners
        self._path = folder / "elastic.jsonl"
        self._meter = LoadMeter()
        self._last_seen: float | None = None

    def watch(self, *, learners_wait: bool) -> None:
        """Adds the time since the last call to the load that `on_step` decides by."""
        now = time.monotonic()
        if self._last_seen is not None:
            self._meter.passed(
                now - self._last_seen,
                learners_wait=learners_wait,
                num_ready=self._runners.num_ready,
                num_idle=self._runners.num_idle,
            )
        self._last_seen = now

    def on_step(self, step: int) -> None:
        """Decides how many actors there should be, and adds or dismisses some."""
        now = self._runners.num_runners
        window, decision = self._meter.stepped(now, self._runners.num_joining, self._config)
        if decision.target == now:
            return
        self._write(step, now, decision, window)
        if decision.target > now:
            self._group.add_workers(decision.target - now)
            self._runners.adopt(start_timeout_s=self._config.join_timeout_s)
        else:
            for _ in range(now - decision.target):
                self._runners.dismiss()

    def _write(self, step: int, before: int, decision: Decision, window: Window) -> None:
        logger.info("step %d: %d rollout actors → %d: %s", step, before, decision.target, decision.reason)
        record = {
            "step": step,
            "time": time.time(),
            "before": before,
            "target": decision.target,
            "learner_wait": round(window.learner_wait, 3),
            "engine_idle": round(window.engine_idle, 3),
            "reason": decision.reason,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
