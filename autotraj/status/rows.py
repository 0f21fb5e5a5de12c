"""Says of each part of a live run what it does, what it waits for, and for how long. Pure functions; no actors.

`board.StatusBoard` writes the result; `status.show` reads it for `python -m autotraj status`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.work import Work

STATUS_FILE = "status.json"
LATE_S = 10.0
"""If the controller hasn't reported for this long, the status says that it is busy or gone."""
MANY = 8
"""If there are more actors than this, they are counted and not listed."""
WORK: dict[str, tuple[str, str]] = {Work.ROLLOUT: ("samples", "group"), Work.REPAIR: ("repairs", "request")}
"""A method of a rollout actor → what the actor does in it, and what one call works on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRow:
    """One part of a run. `Since` measures how long `does` and `waits_on` stay the same; `detail` may change."""

    who: str
    does: str
    waits_on: str = ""
    detail: str = ""


RunnerState = Literal["starting", "syncing", "ready", "down", "draining"]

ENDED = "ended"
"""What the status of a run says after its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerView:
    """What a runner does at one moment."""

    runner_id: int
    state: RunnerState
    policy_version: int
    work: dict[str, int]  # calls in flight, by their method
    probed: bool  # the logprob gate checks it now
    oldest_s: float  # the age of its oldest call in flight


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """The GRPO loop at one moment."""

    step: int
    groups_per_step: int
    max_staleness: int
    num_buffered: int  # scored groups that wait to be trained on
    num_scoring: int
    num_admissible: int  # groups that staleness lets start now
    learners_up: bool
    trains: bool
    broadcasts: bool
    uses_reward_model: bool
    num_repairs: int | None  # groups under repair; None without online repair
    runners: Sequence[RunnerView]
    dropped: Counter[str] = field(default_factory=Counter)  # groups since the last step, by reason
    handed_back: Counter[str] = field(default_factory=Counter)  # likewise; their tasks are sampled again


def loop_rows(state: LoopState) -> list[StatusRow]:
    """The rows of the learners, every rollout actor, scoring and repair."""
    bound = f"the learners: max_staleness = {state.max_staleness} lets no further group start"
    rows = [_learners(state), *runner_rows(state.runners, idle_for=bound if state.num_admissible <= 0 else "")]
    scores = StatusRow(
        who="scoring", does="scores" if state.num_scoring else "idle", detail=_many(state.num_scoring, "group")
    )
    if state.num_scoring and state.uses_reward_model:
        scores = StatusRow(who="scoring", does="scores", waits_on="the reward model", detail=scores.detail)
    rows.append(scores)
    if state.num_repairs is not None:
        does = "repairs" if state.num_repairs else "idle"
        rows.append(StatusRow(who="online repair", does=does, detail=_many(state.num_repairs, "group")))
    return rows


def _learners(state: LoopState) -> StatusRow:
    who, have, need = "learners", state.num_buffered, state.groups_per_step
    if not state.learners_up:
        return StatusRow(who=who, does="start")
    if state.trains:
        return StatusRow(who=who, does="train", detail=f"step {state.step + 1}")
    if state.broadcasts:
        return StatusRow(
            who=who, does="send weights", waits_on="the engines of the broadcast", detail=f"version {state.step}"
        )
    if have >= need:
        return StatusRow(who=who, does="begin a step", detail=f"{have} groups are there")
    sampling = [r for r in state.runners if Work.ROLLOUT in r.work]
    if sampling:
        on = _whom(sampling)
    elif state.num_scoring:
        on = "scoring"
    elif not any(r.state == "ready" for r in state.runners):
        on = "an engine to be ready"
    else:
        on = "the controller to hand out groups"
    detail = f"{have} of {need} groups are scored{_lost(state)}"
    return StatusRow(who=who, does="wait", waits_on=on, detail=detail)


def _lost(state: LoopState) -> str:
    """Says how many groups were lost since the last step, and why; empty if none was."""
    said = ""
    for reasons, what in ((state.dropped, "dropped"), (state.handed_back, "handed back")):
        if total := reasons.total():
            ((reason, count), *others) = reasons.most_common()
            said += f", {total} {what} since the last step ({f'mostly {reason}: {count}' if others else reason})"
    return said


def _whom(runners: Sequence[RunnerView]) -> str:
    if len(runners) > MANY:
        return f"{len(runners)} rollout actors"
    return ("rollout actor " if len(runners) == 1 else "rollout actors ") + ", ".join(str(r.runner_id) for r in runners)


def runner_rows(runners: Sequence[RunnerView], *, idle_for: str = "") -> list[StatusRow]:
    """A row for each. `idle_for` is what an idle runner waits for, if not for the controller."""
    return [_runner(r, f"rollout actor {r.runner_id}", idle_for or "the controller") for r in runners]


def _runner(runner: RunnerView, who: str, idle_for: str) -> StatusRow:
    doing = [(*WORK.get(method, ("works", method)), n) for method, n in sorted(runner.work.items())]
    detail = ", ".join(_many(n, thing) for _, thing, n in doing)
    if detail:
        detail += f", the oldest for {runner.oldest_s:.0f} s"
    if runner.state == "ready":
        if doing:
            return StatusRow(who=who, does=" and ".join(verb for verb, _, _ in doing), detail=detail)
        return StatusRow(who=who, does="idle", waits_on=idle_for, detail=f"ready at version {runner.policy_version}")
    if runner.state == "starting":
        return StatusRow(who=who, does="starts", waits_on="its engine")
    if runner.state == "syncing":
        on = "the logprob gate" if runner.probed else "its weights"
        return StatusRow(who=who, does="takes weights", waits_on=on, detail=detail)
    if runner.state == "draining":
        return StatusRow(who=who, does="leaves", waits_on="its last groups", detail=detail)
    return StatusRow(who=who, does="down", waits_on="Ray to start it again")


class Since:
    """Measures how long each part has done the same and has waited for the same."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[tuple[str, str], float]] = {}

    def seconds(self, rows: Sequence[StatusRow], now: float) -> list[float]:
        """The seconds for each row. A part without a row is forgotten."""
        seen = {}
        for row in rows:
            state = (row.does, row.waits_on)
            before = self._seen.get(row.who)
            seen[row.who] = before if before and before[0] == state else (state, now)
        self._seen = seen
        return [now - seen[row.who][1] for row in rows]


def render_status(status: Mapping[str, Any], *, now: float | None = None, gone: bool = False) -> str:
    """A status of `StatusBoard` as text. `now` is wall-clock time in s; `gone`: its process is known to have ended."""
    age = max(0.0, (time.time() if now is None else now) - status["time"])
    ended, for_s = status["doing"] == ENDED, f"{status['doing_s'] + age:.0f} s"
    header = [
        f"{status['run_dir']}: {status['title']}; "
        + (f"ended {for_s} ago" if ended else f"{status['doing']} for {for_s}"),
        f"reported {age:.0f} s ago by process {status['pid']} on {status['host']}",
    ]
    if gone:
        header.append("THE RUN IS GONE: that process has ended without a report; this is its last status")
    elif age > LATE_S and not ended:
        header.append(
            f"NO REPORT SINCE: the controller is busy ({status['doing']}) and will report after that, or it hangs"
        )
    if not status["rows"]:
        return "\n".join(header)
    cells = [("WHO", "DOES", "FOR", "WAITS ON", "")]
    cells += [
        (row["who"], row["does"], f"{row['since_s'] + age:.0f} s", row["waits_on"] or "–", row["detail"])
        for row in status["rows"]
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*header, "", *lines])


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
