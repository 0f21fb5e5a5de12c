"""What the runner pool keeps of each runner and of each call, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

CallKind = Literal["start", "work", "join", "sync", "probe"]


@dataclass(slots=True)
class Runner:
    """One actor as the controller sees it, see `RunnerPool`."""

    start_timeout_s: float
    state: Literal["starting", "syncing", "ready", "down", "draining"] = "starting"
    policy_version: int = -1
    in_flight: int = 0
    deaths: int = 0
    added: bool = False  # while the run went on: nobody waits for it, and it is given up where another would be fatal
    leaves: bool = False  # told to go: it is not brought back

    def __str__(self) -> str:
        return f"{self.state} at version {self.policy_version} with {self.in_flight} calls"


@dataclass(frozen=True, slots=True)
class Call:
    """One `ObjectRef` in flight."""

    kind: CallKind
    runner_id: int
    deadline: float
    method: str = ""  # of work
    key: str = ""
    policy_version: int = -1

    @property
    def what(self) -> str:
        return self.method or self.kind


@dataclass(frozen=True, slots=True)
class Finished:
    """Work that came back: the method's return value."""

    method: str
    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """Work that didn't; `reason` is a short name for counting."""

    method: str
    key: str
    reason: str


Outcome = Finished | Failed
