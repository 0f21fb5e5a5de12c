"""Weight sync over NCCL: the learners and all engines meet in one broadcast.

    idle ──someone waits, and the learners don't train──▶ joining ──all in the group──▶ sending ──all have it──▶ idle
                     (joining only if other engines live than those in the group)

No process can leave a broadcast, and none can join it late. So a round has all engines that are up. An engine that starts
or restarts waits for the next round. If one dies within a round, the run ends, as the other processes would wait forever.
`engine.weight_transfer = "host"` doesn't need any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from autotraj.errors import RunError


class LearnerSide(Protocol):
    """The methods of `LearnerGroup` that a round uses. Each `Pending` has a deadline of its own."""

    def open_broadcast(self, num_engine_workers: int) -> tuple[dict[str, Any], Any]: ...

    def broadcast(self) -> Any: ...


class BroadcastSync:
    """The state of the rounds. `call(runner_id, method, argument)` starts an engine's call; `answered` reports its end."""

    def __init__(
        self,
        learners: LearnerSide,
        *,
        workers_per_engine: int,
        learners_train: Callable[[], bool],
        call: Callable[[int, Literal["join", "sync"], Any], None],
    ) -> None:
        self._learners = learners
        self._workers_per_engine = workers_per_engine
        self._learners_train = learners_train
        self._call = call
        self._phase: Literal["idle", "joining", "sending"] = "idle"
        self._group: tuple[int, ...] = ()  # runners in the open NCCL group, in the order of their ranks
        self._owed: set[int] = set()
        self._pending: Any = None  # the learners' side of the phase

    @property
    def busy(self) -> bool:
        """Whether a round is under way. The learners must not start a step then: they would send newer weights than those
        of the announced version."""
        return self._phase != "idle"

    def holds(self, runner_id: int) -> bool:
        """Whether a runner is in the round that is under way, and so can't leave."""
        return self.busy and runner_id in self._group

    def advance(self, waiting: Sequence[int], members: Sequence[int]) -> None:
        """Begins a round if runners are `waiting` for one, or continues the one under way.

        `members` are all runners whose engine is up. Raises LearnerError when the learners fail or miss their deadline.
        """
        if self._phase == "idle":
            if waiting and not self._learners_train():
                self._join(tuple(sorted(members)))
        elif not self._owed and self._pending.poll() is not None:
            if self._phase == "joining":
                self._send()
            else:
                self._phase = "idle"

    def answered(self, runner_id: int) -> None:
        """The call of this round on `runner_id` returned."""
        self._owed.discard(runner_id)

    def lost(self, runner_id: int, message: str) -> None:
        """A runner died. Raises RunError if that was in the middle of a round."""
        if self.busy and runner_id in self._group:
            raise RunError(
                f"{message}; it was in the middle of an NCCL broadcast ({self._phase}), which the others can't leave. "
                "Continue from the last checkpoint with --resume"
            )
        self._group = ()  # the next round opens a group without it

    def _join(self, members: tuple[int, ...]) -> None:
        if members == self._group:
            self._send()
            return
        self._phase, self._group, self._owed = "joining", members, set(members)
        init_info, self._pending = self._learners.open_broadcast(len(members) * self._workers_per_engine)
        for place, runner_id in enumerate(members):
            # Rank 0 is the sender; an engine's workers count on from its offset.
            offset = init_info["rank_offset"] + place * self._workers_per_engine
            self._call(runner_id, "join", init_info | {"rank_offset": offset})

    def _send(self) -> None:
        self._phase, self._owed = "sending", set(self._group)
        self._pending = self._learners.broadcast()
        for runner_id in self._group:
            self._call(runner_id, "sync", None)
