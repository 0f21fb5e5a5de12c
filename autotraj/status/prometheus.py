"""The controller's metrics for Prometheus. Ray's agent on its node exports them as `ray_autotraj_…`.

The metrics of engines and tools are in `actors/metrics.py` and `autotraj/gateways/metrics.py`.
`cluster/grafana_dashboard.json` shows all of them; a test runs its queries on a Prometheus that scrapes a run.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from typing import get_args

from ray.util.metrics import Counter, Gauge, Histogram

from autotraj.status.rows import RunnerState, RunnerView
from trajectory.ledger import LedgerCounts
from trajectory.types import Group

STALENESS_BORDERS = [0.5, 1.5, 2.5, 3.5, 4.5, 6.5, 8.5, 12.5, 16.5]
"""They lie between the whole numbers that staleness takes. A border must be above 0."""

BY_NAME: dict[str, tuple[str, dict[str, str]]] = {
    "step": ("policy_version", {}),
    "step_seconds": ("step_seconds", {}),
    "accuracy": ("accuracy", {}),
    "tool_call_rate": ("tool_call_rate", {}),
    "reward_mean": ("reward", {"part": "total"}),
    "sync/logprob_diff_mean": ("sync_logprob_diff", {"of": "mean"}),
    "sync/logprob_diff_max": ("sync_logprob_diff", {"of": "largest"}),
    "sync/changed_share": ("sync_changed_share", {}),
    "sync_seconds": ("weight_sync_seconds", {}),
    "runner_restarts": ("restarts", {"role": "rollout"}),
    "reward_model_restarts": ("restarts", {"role": "reward model"}),
}
"""A step's metric → its gauge and tags."""

BY_PREFIX: dict[str, tuple[str, str]] = {
    "reward/": ("reward", "part"),
    "finish/": ("finish_ratio", "reason"),
    "dropped/": ("dropped_groups", "reason"),
    "handed_back/": ("handed_back_groups", "reason"),
}
"""The beginning of a step's metric → its gauge and the name of a tag; the rest of the metric's name is the tag's value."""

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "policy_version": ("Optimizer steps taken", ()),
    "step_seconds": ("From the end of one step to the end of the next", ()),
    "accuracy": ("Share of right answers in the last step's groups", ()),
    "tool_call_rate": ("Share of the last step's trajectories that called a tool", ()),
    "reward": ("Mean of the last step's rewards, by part; total is their sum", ("part",)),
    "finish_ratio": ("How the last step's trajectories ended", ("reason",)),
    "sync_logprob_diff": (
        "Absolute difference of logprobs of engine and learner on the probe at the last gate, nats a token",
        ("of",),
    ),
    "sync_changed_share": ("Share of weights that the last step changed, in the dtype of the engines", ()),
    "weight_sync_seconds": ("From the push to the gate passed, of the engine that was last", ()),
    "restarts": ("Actors brought back so far in this session", ("role",)),
    "dropped_groups": ("Groups given up so far in the run, by reason", ("reason",)),
    "handed_back_groups": ("Groups sampled again so far in the run, by reason", ("reason",)),
    "groups": ("Groups by where they are", ("state",)),
    "rollout_actors": ("Rollout actors by state", ("state",)),
}

LEARNER_PHASES = ("pack", "logprobs", "gradients", "optimizer", "publish")


def gauges(metrics: Mapping[str, float]) -> list[tuple[str, dict[str, str], float]]:
    """(gauge, tags, value) for all of a step's metrics that have a gauge."""
    found = []
    for name, value in metrics.items():
        if name in BY_NAME:
            gauge, tags = BY_NAME[name]
            found.append((gauge, tags, value))
        for prefix, (gauge, tag) in BY_PREFIX.items():
            if name.startswith(prefix):
                found.append((gauge, {tag: name.removeprefix(prefix)}, value))
    return found


def learner_seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """The learners' seconds in a step, by phase. The phases add up to `step_seconds`."""
    trained = metrics["train_seconds"]
    phases = {phase: metrics.get(f"learner/seconds/{phase}", 0.0) for phase in LEARNER_PHASES}
    waited = max(0.0, metrics["step_seconds"] - trained)
    return {"wait for groups": waited, **phases, "other": max(0.0, trained - sum(phases.values()))}


def ages(groups: Sequence[Group], policy_version: int) -> list[int]:
    """How many versions each trajectory's oldest token is behind `policy_version`."""
    versions = [t.min_policy_version for group in groups for t in group.trajectories]
    return [policy_version - version for version in versions if version is not None]


class MetricsExport:
    """Exports the metrics. There may be one in a process."""

    def __init__(self) -> None:
        self._gauges = {name: Gauge(f"autotraj_{name}", text, tags) for name, (text, tags) in GAUGES.items()}
        self._staleness = Histogram(
            "autotraj_staleness_versions", "Policy versions that a trained trajectory lags behind", STALENESS_BORDERS
        )
        self._learner = Counter("autotraj_learner_seconds", "The learners' time by phase", ("phase",))
        self._trained = Counter("autotraj_trained_groups", "Groups trained on")
        self._last_step: list[tuple[str, dict[str, str], float]] = []

    def now(self, counts: LedgerCounts, runners: Sequence[RunnerView], totals: Mapping[str, float]) -> None:
        """Sets the present numbers of groups and actors. `totals`, named as a step's metrics: what was lost or restarted so
        far in the run."""
        for state in ("pending", "leased", "finished", "scored"):
            self._gauges["groups"].set(getattr(counts, state), {"state": state})
        states = Tally(runner.state for runner in runners)
        for state in get_args(RunnerState):
            self._gauges["rollout_actors"].set(states[state], {"state": state})
        # `stale` is set even at 0: else no drop looks like a missing series. The last step's gauges are set again because
        # Ray 2.60 drops a gauge that isn't set within two of its reports, 20 s.
        current = gauges({"dropped/stale": 0.0, "handed_back/stale": 0.0, **totals})
        for name, tags, value in [*self._last_step, *current]:
            self._gauges[name].set(value, tags)

    def step(self, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Exports a step that has ended: the groups trained on, and its metrics."""
        self._last_step = gauges(metrics)
        for name, tags, value in self._last_step:
            self._gauges[name].set(value, tags)
        for phase, seconds in learner_seconds(metrics).items():
            if seconds > 0:
                self._learner.inc(seconds, {"phase": phase})
        for age in ages(groups, int(metrics["step"]) - 1):
            self._staleness.observe(age)
        self._trained.inc(len(groups))
