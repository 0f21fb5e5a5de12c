"""What goes into a repair and what comes out of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from rewards.quality import Quality
from trajectory.types import Task, Trajectory

AttemptFn = Callable[[Task, str, int, float], Awaitable[Trajectory]]
"""`await attempt(task, prompt, seed, temperature)`: an episode on the user message `prompt`. Its failures are data, but for
`PromptTooLong`."""

Reason = Literal[
    "copy",
    "forged_result",
    "too_long",
    "too_many_turns",
    "too_many_calls",
    "unclosed_tag",
    "no_answer",
    "unparseable",
    "tool_unavailable",
    "no_tools",
    "wrong_answer",
    "low_quality",
    "prompt_too_long",
    "deadline",
    "endpoint_down",
    "endpoint_timeout",
    "endpoint_refused",
    "endpoint_garbled",
    "rate_limited",
    "engine_dead",
    "engine_timeout",
    "engine_failed",
    "episode_error",
]
"""Why an attempt was not accepted. The first twelve are about what was written: the bad trajectory again; a `<result>` of
the model's own; a limit of the episode; a tag that is never closed, no closed `<answer>`, or other broken markup; a tool
that could not be reached; no tool called though the original did or it is required; then the answer, then the score. The
others are about the way there."""

OUTAGES: frozenset[Reason] = frozenset(
    {"endpoint_down", "endpoint_timeout", "endpoint_refused", "rate_limited", "engine_dead"}
)
"""Nobody was there to write. No further attempt is made: it would meet the same, and endpoints have had their retries."""


class PromptTooLong(Exception):
    """The prompt of a repair exceeds its limit; the message says by how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairRequest:
    """A bad trajectory and what is known of it."""

    task: Task
    trajectory: Trajectory
    correct: bool  # right and well-formed: only its path is poor
    quality: Quality
    ideal_num_words: int  # of the question's shortest correct trajectory; 0 if it has none
    problems: tuple[str, ...]  # names: "wrong answer", "low <dimension>", broken format rules, other notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt at a repair."""

    reason: str  # a `Reason`; empty if it was accepted
    quality: Quality | None  # None if it didn't come that far
    text: str  # what was written
    temperature: float
    error: str = ""  # for people: who waited on whom


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairResult:
    """What became of a request. Nothing accepted: a hard case, and every attempt says why."""

    accepted: Trajectory | None  # as an answer to the original prompt; it carries no logprobs of any policy
    quality: Quality | None  # of what was accepted
    attempts: tuple[Attempt, ...]

    @property
    def outage(self) -> str:
        """The reason, if nothing was accepted because nobody was there to write: not a hard case, but worth another try."""
        last = self.attempts[-1].reason if self.attempts else ""
        return last if last in OUTAGES else ""
