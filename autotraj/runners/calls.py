"""The records that the runner pool keeps of runners and calls, and the results that it returns."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from autotraj.errors import RunError, Stalled
from autotraj.status.rows import RunnerState, RunnerView

CallKind = Literal["start", "work", "join", "sync", "probe"]


@dataclass(slots=True)
class RunnerRecord:
    """The controller's record of one actor, see `RunnerPool`."""

    start_timeout_s: float
    state: RunnerState = "starting"
    policy_version: int = -1
    in_flight: int = 0
    deaths: int = 0
    # Whether it was added during the run: nothing waits for it, and it is given up where the loss of another ends the run.
    added: bool = False
    leaves: bool = False  # it was dismissed and will not be restarted

    def __str__(self) -> str:
        return f"{self.state} at version {self.policy_version} with {self.in_flight} calls"


@dataclass(frozen=True, slots=True)
class PendingCall:
    """One `ObjectRef` in flight."""

    kind: CallKind
    runner_id: int
    deadline: float
    method: str = ""  # of work
    key: str = ""
    policy_version: int = -1
    started: float = field(default_factory=time.monotonic)

    @property
    def what(self) -> str:
        return self.method or self.kind


def views(runners: Mapping[int, RunnerRecord], calls: Iterable[PendingCall], now: float) -> list[RunnerView]:
    """A view of each runner, in their order."""
    own: dict[int, list[PendingCall]] = {runner_id: [] for runner_id in runners}
    for call in calls:
        own[call.runner_id].append(call)
    return [_view(runner_id, runner, own[runner_id], now) for runner_id, runner in runners.items()]


def _view(runner_id: int, runner: RunnerRecord, own: Sequence[PendingCall], now: float) -> RunnerView:
    return RunnerView(
        runner_id=runner_id,
        state=runner.state,
        policy_version=runner.policy_version,
        work=Counter(call.method for call in own if call.kind == "work"),
        probed=any(call.kind == "probe" for call in own),
        oldest_s=max((now - call.started for call in own), default=0.0),
    )


def managed(group: EnvRunnerGroup) -> FaultTolerantActorManager:
    """The actor manager of RLlib's group. The group's own methods don't say which request failed."""
    return group._worker_manager


@dataclass(frozen=True, slots=True)
class Finished:
    """Work that succeeded, with the method's return value."""

    method: str
    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """Work that failed. `reason` is a short name for counting."""

    method: str
    key: str
    reason: str


CallResult = Finished | Failed


def reason(error: BaseException) -> str:
    """A remote error in one line, without Ray's traceback and addresses."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "Ray's memory monitor ended it"
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = cause_of(error)
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    # The last line of Ray's message says how the actor died, or which exception its constructor raised.
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def end_actor(actor: Any) -> None:
    """Ends the process of an actor for good. Does nothing if Ray itself has ended in this process: then its actors are gone
    and `ray.kill` would raise."""
    if ray.is_initialized():
        ray.kill(actor)


def cause_of(error: BaseException) -> BaseException:
    """The exception that was raised in the actor."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def gather(refs: Sequence[Any], timeout_s: float, *, what: str, who: Callable[[], str]) -> list[Any]:
    """All results within `timeout_s`. Raises Stalled, which ends with `who()`, the actors' state, or RunError."""
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except ray.exceptions.GetTimeoutError:
        raise Stalled(f"{what} not answered within {timeout_s:.0f} s: {who()}") from None
    except ray.exceptions.RayError as error:
        raise RunError(f"{what} failed: {reason(error)}") from error
