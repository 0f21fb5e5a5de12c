"""Drives the rollout actors from the controller: starts them, gives them work and weights, and replaces those that die.

The states of a runner:

    starting ──engine up──▶ syncing ──weights in, gate passed──▶ ready ──a new version──▶ syncing …
        ▲                                                          │
        └────────────── RLlib restarts the actor ◀──── down ◀──────┘ any actor error

and, where the pool follows the work (`autotraj/runners/elastic.py`), ready ──dismissed──▶ draining ──its last group──▶ gone.

This file makes the calls itself, one `ObjectRef` each, so that a failure belongs to a lease. RLlib's
`FaultTolerantActorManager` checks and restarts the actors. Only a runner that is ready at the newest version gets new work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import ray
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from autotraj.errors import OutOfMemory, RunError, Stalled, UserError
from autotraj.memory import MemoryDeaths
from autotraj.runners.broadcast import BroadcastSync, LearnerSide
from autotraj.runners.calls import (
    CallKind,
    CallResult,
    Failed,
    Finished,
    PendingCall,
    RunnerRecord,
    cause_of,
    gather,
    reason,
    views,
)
from autotraj.runners.gate import Gate
from autotraj.status.board import StatusBoard
from autotraj.status.rows import RunnerView
from models.checksums import Checksums
from models.weight_update import LogprobProbe

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 0.2
MAX_RESTARTS = 10
"""A runner that has died more often ends the run, or loses its place if it was added during the run."""
MAX_FIRST_STARTS = 3
"""How often a runner may raise in `start` before any of the pool has come up: such an error happens every time."""


class RunnerPool:
    """Drives the actors of `manager` without ever blocking on one: rollout actors, or others with an async `start`."""

    def __init__(
        self,
        manager: FaultTolerantActorManager,
        *,
        start_timeout_s: float,
        sync_timeout_s: float,
        gate: Gate | None = None,
        role: str = "rollout actor",
    ) -> None:
        """`gate`: what engines must pass after a weight sync; None for a pool that gets no weights."""
        self._manager = manager
        self._start_timeout_s, self._sync_timeout_s = start_timeout_s, sync_timeout_s
        self.gate = gate
        self._role = role
        self._came_up = False  # at least one runner did
        self._memory_deaths = MemoryDeaths()
        self._runners: dict[int, RunnerRecord] = {i: RunnerRecord(start_timeout_s) for i in self._manager.actor_ids()}
        self._calls: dict[ray.ObjectRef, PendingCall] = {}
        self._update: Any = None  # ObjectRef of the newest WeightUpdate; None while engines hold what they loaded
        self.policy_version = 0
        self.num_restarts, self.sync_seconds = 0, 0.0
        self._sync_started: dict[int, float] = {}
        self._broadcast: BroadcastSync | None = None
        self.on_poll: Callable[[], None] = lambda: None  # to keep the status up to date while a caller waits here
        self.board: StatusBoard | None = None  # the board of that status

    def use_broadcast(
        self, learners: LearnerSide, *, workers_per_engine: int, learners_train: Callable[[], bool]
    ) -> None:
        """From now on weights come by NCCL, in rounds with all engines, which begin while `learners_train()` is False."""
        self._broadcast = BroadcastSync(
            learners, workers_per_engine=workers_per_engine, learners_train=learners_train, call=self._call_in_round
        )

    # --- what the controller asks -----------------------------------------------------------------------------------

    @property
    def num_ready(self) -> int:
        return len(self.ready_ids())

    @property
    def has_weights(self) -> bool:
        """Whether weights have been pushed."""
        return self._update is not None

    @property
    def broadcasting(self) -> bool:
        """Whether the learners must wait before their next step, see `BroadcastSync.busy`."""
        return self._broadcast is not None and self._broadcast.busy

    @property
    def num_runners(self) -> int:
        """The number of runners, with those that start and without those that leave."""
        return sum(not r.leaves for r in self._runners.values())

    @property
    def num_joining(self) -> int:
        """The number of added runners that aren't ready yet."""
        return sum(r.added and r.policy_version < 0 and not r.leaves for r in self._runners.values())

    @property
    def num_serving(self) -> int:
        """The number of runners that work, or take weights to do so; not those that start, leave or are down."""
        return sum(r.state in ("ready", "syncing") and r.policy_version >= 0 for r in self._runners.values())

    @property
    def num_idle(self) -> int:
        """The number of ready runners without a call."""
        return sum(r.state == "ready" and not r.in_flight for r in self._runners.values())

    def num_in_flight(self, method: str) -> int:
        """How many calls of `method` are being worked on."""
        return sum(call.method == method for call in self._calls.values())

    def describe(self) -> str:
        """The state of each runner, for messages: `runner 1 ready at version 3 with 4 calls`."""
        return "; ".join(f"runner {i} {runner}" for i, runner in self._runners.items())

    def views(self) -> list[RunnerView]:
        return views(self._runners, self._calls.values(), time.monotonic())

    def start(self) -> None:
        """Begins to start every engine; `wait_ready` or `poll` sees them come up."""
        for runner_id in self._runners:
            self._start(runner_id)

    def wait_ready(self, *, everyone: bool = True) -> None:
        """Blocks until all engines, or at least one, are ready, except added ones. Raises Stalled at the start deadline."""
        deadline = time.monotonic() + self._start_timeout_s
        while self.num_ready < (self.num_runners - self.num_joining if everyone else 1):
            if time.monotonic() > deadline:
                raise Stalled(f"engines not ready after {self._start_timeout_s:.0f} s: {self.describe()}")
            self.restore()
            self.poll(0.25)

    def adopt(self, *, start_timeout_s: float) -> list[int]:
        """Takes in actors that were added to the manager: they start, get the newest weights, then work."""
        added = [i for i in self._manager.actor_ids() if i not in self._runners]
        for runner_id in added:
            self._runners[runner_id] = RunnerRecord(start_timeout_s, added=True)
            self._start(runner_id)
        return added

    def dismiss(self) -> int:
        """Dismisses one runner: one that isn't ready yet, else the one with the least work, which it finishes first."""
        staying = [i for i, r in self._runners.items() if not r.leaves]
        runner_id = min(staying, key=lambda i: (self._runners[i].state == "ready", self._runners[i].in_flight))
        runner = self._runners[runner_id]
        runner.leaves = True
        if runner.state in ("ready", "syncing") and (runner.in_flight or self._is_in_round(runner_id)):
            runner.state = "draining"
        else:
            self._remove(runner_id)
        return runner_id

    def idle_slot(self) -> int | None:
        """The ready runner with the least work, or None."""
        return min(self.ready_ids(), key=lambda i: self._runners[i].in_flight, default=None)

    def submit(self, runner_id: int, key: str, method: str, *, timeout_s: float, **arguments: Any) -> None:
        """Gives a runner work. `poll` always returns its outcome, with `method` and `key`."""
        ref = getattr(self._actor(runner_id), method).remote(**arguments)
        self._track(ref, PendingCall("work", runner_id, time.monotonic() + timeout_s, method=method, key=key))

    def push(self, update: Any, probe: LogprobProbe, checksums: Checksums) -> None:
        """Publishes new weights (`update`: ObjectRef of a `WeightUpdate`). Runners finish the groups that they sample.
        Raises GateError if the learner itself can't compute with them."""
        assert self.gate is not None, "weights are pushed through a gate"
        self.gate.begin(probe, checksums)
        self._update, self.policy_version = update, probe.policy_version
        for runner_id, runner in self._runners.items():
            if runner.state == "ready":
                self._sync(runner_id)
        self._advance_broadcast()

    def poll(self, timeout_s: float, also: Sequence[Any] = ()) -> list[CallResult]:
        """Handles the calls that end within `timeout_s`; returns at once if an ObjectRef of `also` is ready."""
        self.on_poll()
        if refs := [*self._calls, *also]:
            ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
        else:  # a round may still wait for the learners
            time.sleep(timeout_s)
        outcomes: list[CallResult] = []
        if self._calls:
            ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
            for ref in ready:
                # If an earlier result showed that its runner is dead, the call was removed with it.
                if (call := self._calls.pop(ref, None)) is not None:
                    outcomes.extend(self._handle(ref, call))
        outcomes.extend(self._expire())
        self._advance_broadcast()
        for runner_id in list(self._runners):
            self._let_go(runner_id)  # those that a round held
        return outcomes

    def restore(self) -> list[int]:
        """Asks RLlib which dead runners are back and starts their engines again. Returns their ids."""
        if all(r.state != "down" for r in self._runners.values()):
            return []
        restored: list[int] = self._manager.probe_unhealthy_actors(timeout_seconds=PROBE_TIMEOUT_S, mark_healthy=True)
        for runner_id in restored:
            logger.warning("%s is back; its engine starts again", self._name(runner_id))
            self.num_restarts += 1
            self._start(runner_id)
        return restored

    def map(self, method: str, shards: dict[int, dict[str, Any]], timeout_s: float) -> list[Any]:
        """Calls `method` on each runner with its own arguments and waits, within `timeout_s`, for all results."""
        refs = [getattr(self._actor(i), method).remote(**kwargs) for i, kwargs in shards.items()]
        return gather(refs, timeout_s, what=f"{method} on a {self._role}", who=self.describe)

    def forget(self, method: str) -> None:
        """Cancels all calls of `method`; their outcomes are not needed any more."""
        for ref, call in [(ref, call) for ref, call in self._calls.items() if call.method == method]:
            del self._calls[ref]
            ray.cancel(ref)
            runner = self._runners[call.runner_id]
            runner.in_flight -= 1
            self._let_go(call.runner_id)

    def ready_ids(self) -> list[int]:
        return [i for i, r in self._runners.items() if r.state == "ready"]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _actor(self, runner_id: int) -> Any:
        return self._manager.actors()[runner_id]

    def _name(self, runner_id: int) -> str:
        return f"{self._role} {runner_id}"

    def _track(self, ref: Any, call: PendingCall) -> None:
        self._calls[ref] = call
        self._runners[call.runner_id].in_flight += 1

    def _start(self, runner_id: int) -> None:
        runner = self._runners[runner_id]
        runner.state = "starting"
        deadline = time.monotonic() + runner.start_timeout_s
        self._track(self._actor(runner_id).start.remote(), PendingCall("start", runner_id, deadline))

    def _sync(self, runner_id: int) -> None:
        runner = self._runners[runner_id]
        if self._update is None:  # nothing was published yet: the engine has loaded the very checkpoint
            runner.state, runner.policy_version = "ready", self.policy_version
            return
        runner.state = "syncing"
        self._sync_started[runner_id] = time.monotonic()
        if self._broadcast is None:
            self._send_update(runner_id)
        # Else it waits for the next round.

    def _send_update(self, runner_id: int) -> None:
        # In a list, so that Ray passes the reference and the runner fetches from the nearest copy.
        ref = self._actor(runner_id).update_weights.remote([self._update])
        deadline = time.monotonic() + self._sync_timeout_s
        self._track(ref, PendingCall("sync", runner_id, deadline, policy_version=self.policy_version))

    def _advance_broadcast(self) -> None:
        if self._broadcast is None or self._update is None:
            return
        at_work = {call.runner_id for call in self._calls.values() if call.kind in ("join", "sync", "probe")}
        waiting = [i for i, r in self._runners.items() if r.state == "syncing" and i not in at_work]
        members = [i for i, r in self._runners.items() if r.state in ("syncing", "ready")]
        self._broadcast.advance(waiting, members)

    def _call_in_round(self, runner_id: int, kind: Literal["join", "sync"], argument: Any) -> None:
        self._runners[runner_id].state = "syncing"
        if kind == "sync":
            self._send_update(runner_id)
            return
        ref = self._actor(runner_id).init_weight_transfer.remote(argument)
        self._track(ref, PendingCall("join", runner_id, time.monotonic() + self._sync_timeout_s))

    def _handle(self, ref: Any, call: PendingCall) -> list[CallResult]:
        runner = self._runners[call.runner_id]
        runner.in_flight -= 1
        who = self._name(call.runner_id)
        try:
            value = ray.get(ref, timeout=30.0)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
            self._check_memory(error)
            return self._record_death(call, f"{who} died: {reason(error)}")
        except ray.exceptions.RayError as error:
            # Rollouts return failures as data, so an exception is a defect of the engine or of this software.
            message = f"{who} failed in {call.what}: {reason(error)}"
            self._check_memory(error)
            if call.kind == "start" and not self._came_up:
                self._check_start(runner, cause_of(error), message)
            return self._record_death(call, message, kill=True)
        handler: dict[CallKind, Callable[[PendingCall, Any], list[CallResult] | None]] = {
            "start": self._on_started,
            "join": self._on_joined,
            "sync": self._on_synced,
            "probe": self._on_probed,
            "work": lambda c, result: [Finished(c.method, c.key, result)],
        }
        outcomes = handler[call.kind](call, value) or []
        if runner.leaves:
            runner.state = "draining"  # even if the handler raised
            self._let_go(call.runner_id)
        return outcomes

    def _check_start(self, runner: RunnerRecord, cause: BaseException, message: str) -> None:
        """Raises if another start would not help: an engine refuses its settings, or the start has failed too often."""
        if isinstance(cause, ValueError):
            raise UserError(message)
        if runner.deaths + 1 >= MAX_FIRST_STARTS:
            raise RunError(f"{message}; that was its start number {runner.deaths + 1}")

    def _check_memory(self, error: Exception) -> None:
        """Raises OutOfMemory when a second runner was ended because of memory."""
        if self._memory_deaths.note(error) and self._memory_deaths.count > 1:
            raise OutOfMemory(f"{self._role}s were ended because of memory {self._memory_deaths.count} times")

    def _on_started(self, call: PendingCall, _: Any) -> None:
        self._came_up = True
        self._sync(call.runner_id)

    def _on_joined(self, call: PendingCall, _: Any) -> None:
        assert self._broadcast is not None
        self._broadcast.answered(call.runner_id)

    def _on_synced(self, call: PendingCall, _: Any) -> None:
        assert self.gate is not None
        if self._broadcast is not None:
            self._broadcast.answered(call.runner_id)
        ref = self._actor(call.runner_id).answer_gate.remote(list(self.gate.probe.token_ids), self.gate.names)
        deadline = time.monotonic() + self._sync_timeout_s
        self._track(ref, PendingCall("probe", call.runner_id, deadline, policy_version=call.policy_version))

    def _on_probed(self, call: PendingCall, answer: Any) -> None:
        if call.policy_version != self.policy_version:  # a newer push has come
            self._sync(call.runner_id)
            return
        assert self.gate is not None
        self.gate.check(answer, who=self._name(call.runner_id))
        runner = self._runners[call.runner_id]
        runner.state, runner.policy_version = "ready", call.policy_version
        self.sync_seconds = time.monotonic() - self._sync_started.pop(call.runner_id, time.monotonic())

    def _record_death(self, call: PendingCall, message: str, *, kill: bool = False) -> list[CallResult]:
        """Marks a runner down and fails all its open calls."""
        runner = self._runners[call.runner_id]
        runner.state, runner.deaths = "down", runner.deaths + 1
        logger.warning("%s", message)
        if runner.deaths > MAX_RESTARTS and not runner.added:
            raise RunError(f"{self._name(call.runner_id)} died {runner.deaths} times; last: {message}")
        if self._broadcast is not None:
            self._broadcast.lost(call.runner_id, message)
        owed = [call, *(c for c in self._calls.values() if c.runner_id == call.runner_id)]
        self._calls = {ref: c for ref, c in self._calls.items() if c.runner_id != call.runner_id}
        runner.in_flight = 0
        # An added runner that doesn't come up has no machine: it is given up, and may be requested again.
        if runner.leaves or (runner.added and (call.kind == "start" or runner.deaths > MAX_RESTARTS)):
            self._remove(call.runner_id)
        else:
            if kill:
                ray.kill(self._actor(call.runner_id), no_restart=False)
            self._manager.set_actor_state(call.runner_id, healthy=False)
        return [Failed(c.method, c.key, "actor_died") for c in owed if c.kind == "work"]

    def _is_in_round(self, runner_id: int) -> bool:
        return self._broadcast is not None and self._broadcast.holds(runner_id)

    def _let_go(self, runner_id: int) -> None:
        """Ends a runner that was dismissed, once it has no open call and isn't in a round."""
        runner = self._runners[runner_id]
        if runner.leaves and not runner.in_flight and not self._is_in_round(runner_id):
            self._remove(runner_id)

    def _remove(self, runner_id: int) -> None:
        """Ends a runner without open calls, for good."""
        logger.info("%s leaves", self._name(runner_id))
        self._calls = {ref: c for ref, c in self._calls.items() if c.runner_id != runner_id}
        del self._runners[runner_id]
        ray.kill(self._manager.remove_actor(runner_id), no_restart=True)

    def _expire(self) -> list[CallResult]:
        """A call past its deadline means that its runner hangs: it is killed, and RLlib brings it back."""
        now = time.monotonic()
        outcomes: list[CallResult] = []
        for ref, call in list(self._calls.items()):
            if call.deadline < now and ref in self._calls:
                del self._calls[ref]
                who = self._name(call.runner_id)
                outcomes.extend(self._record_death(call, f"{who} did not answer {call.what} in time", kill=True))
        return outcomes
