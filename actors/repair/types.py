"""The input and output types of a repair."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from rewards.quality import Quality
from trajectory.types import EpisodeError, Task, Trajectory

AttemptFn = Callable[[Task, str, int, float], Awaitable[Trajectory]]
"""`await attempt(task, prompt, seed, temperature)`: an episode on the user message `prompt`. Its failures are data, except
for `PromptTooLong`."""

Reason = Literal[
    "copy",
    "forged_result",
    "too_long",
    "too_many_turns",
    "too_many_calls",
    "unclosed_tag",
    "no_answer",
    "unparseable",
    "no_tools",
    "wrong_answer",
    "low_quality",
    "prompt_too_long",
    "deadline",
    EpisodeError,
]
"""Why an attempt was not accepted. The first eleven are about the text: the bad trajectory again; a `<result>` that the
model wrote itself; a limit of the episode; a tag that is never closed, no closed `<answer>`, or other broken markup; no
tool call although the original had one or it is required; then the answer, then the score. The other reasons are about
failures before there was a text."""

OUTAGES: frozenset[Reason] = frozenset(
    {"endpoint_down", "endpoint_timeout", "endpoint_refused", "rate_limited", "engine_dead", "tool_unavailable"}
)
"""Reasons that mean that the repairer, or a tool, can't be reached. No further attempt is made: it would fail in the same
way, and endpoints and tool calls have had their retries."""

WRONG_ANSWER = "wrong answer"
"""The name of the problem that an answer is wrong."""


class PromptTooLong(Exception):
    """The prompt of a repair exceeds its limit. The message says by how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairRequest:
    """A bad trajectory and its known problems."""

    task: Task
    trajectory: Trajectory
    correct: bool  # right and well-formed, so only its path is poor
    quality: Quality  # its ideal number of words is that of the question's shortest correct trajectory
    wrong_answer: bool
    notes: tuple[str, ...]  # those of its reward: broken format rules, why its answer could not be compared
    low_dimensions: tuple[str, ...]  # the dimensions of `quality` that are too low

    @property
    def problems(self) -> tuple[str, ...]:
        """The names of all problems, in records and in prompts. Models were trained on these words, so they stay."""
        wrong = (WRONG_ANSWER,) if self.wrong_answer else ()
        return (*wrong, *self.notes, *(f"low {dimension}" for dimension in self.low_dimensions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt at a repair."""

    reason: str  # a `Reason`; empty if it was accepted
    quality: Quality | None  # None if it was not computed
    text: str  # the text of the attempt
    temperature: float
    error: str = ""  # for people: what failed, or what was waited for


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairResult:
    """The result of a request. If nothing was accepted, it is a hard case, and every attempt has its reason."""

    accepted: Trajectory | None  # as an answer to the original prompt; it carries no logprobs of any policy
    quality: Quality | None  # that of the accepted repair
    attempts: tuple[Attempt, ...]

    @property
    def outage(self) -> str:
        """The reason, if nothing was accepted because the repairer can't be reached. Then it is no hard case: try again."""
        last = self.attempts[-1].reason if self.attempts else ""
        return last if last in OUTAGES else ""
