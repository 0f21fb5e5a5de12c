"""The data that is passed between the rooms, one type for each step.

    Task ──lease──▶ RolloutActor ──Group of Trajectory──▶ rewards ──Reward each──▶ learners

Lengths: P prompt tokens, T response tokens. Arrays are numpy, so that Ray passes them without copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TaskKind = Literal["math", "qa"]

ToolStatus = Literal["ok", "error", "timeout", "output_limit", "memory", "rejected", "unavailable"]
"""How a tool call ended: `ok`, the code failed (`error`), it was killed at its deadline (`timeout`), it wrote more than
allowed (`output_limit`), it ran out of memory (`memory`), the request itself was refused (`rejected`), or no tool could
be reached in time (`unavailable`)."""

FinishReason = Literal["answer", "eos", "length", "turn_limit", "tool_limit", "malformed", "deadline", "error"]
"""Why an episode ended: an `<answer>` was closed; the model stopped without one (`eos`); a token, turn or tool-call limit;
markup that can't be continued (`malformed`); the episode's own deadline; an error of the engine (see `Trajectory.error`)."""

EpisodeError = Literal[
    "engine_dead",
    "engine_timeout",
    "engine_failed",
    "endpoint_down",
    "endpoint_timeout",
    "endpoint_refused",
    "endpoint_garbled",
    "rate_limited",
    "tool_unavailable",
    "episode_error",
]
"""What failed if an episode ended with `error`: its engine, the endpoint of a repairer, a tool, or the episode itself, such
as a prompt that is too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A question with its gold answers."""

    id: str
    question: str
    golds: tuple[str, ...]  # at least one; an answer that matches any of them is right
    kind: TaskKind = "math"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """The model's request: the text inside one `<code>` or `<search>`."""

    tool: str  # registry name: "python", "search"
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """The sandbox's answer. `output` is hostile text: escape it before it is shown or appended."""

    status: ToolStatus
    output: str = ""
    message: str = ""  # the reason if it isn't ok, for people; the model reads it too if a limit was reached
    duration_s: float = 0.0  # inside the sandbox, without queueing
    queue_s: float = 0.0
    fresh: bool = True  # for sessions: False if the state of an existing session was used
    retry_after_s: float | None = None  # for `unavailable`: when to try again


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One engine call and, if the model made one, its tool call. Offsets count response tokens."""

    text: str  # as sampled, cut after the stop string
    start: int
    end: int  # [start, end): the model's own tokens
    result_end: int  # [end, result_end): the environment's tokens; equal to `end` without a tool call
    tool_call: ToolCall | None = None
    tool_result: ToolResult | None = None
    generate_s: float = 0.0
    tool_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Response tokens [start, end) in a row that were sampled by one policy version. Empty if a request began under this
    version, and its first token was sampled only by the next: what came before may then have keys and values of this one."""

    start: int
    end: int
    policy_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One episode as it was sampled. Tokens come in and go out, and are never re-tokenised.

    `response_ids`, `loss_mask` and `logprobs` have length T. `loss_mask` is True on the model's own tokens and False on
    the environment's. `logprobs` (natural log, temperature included as the engine reports them) are 0 where it is False.
    """

    task_id: str
    index: int  # position in its group
    prompt_ids: NDArray[np.int32]  # (P,)
    response_ids: NDArray[np.int32]  # (T,)
    loss_mask: NDArray[np.bool_]  # (T,)
    logprobs: NDArray[np.float32]  # (T,)
    segments: tuple[Segment, ...]
    turns: tuple[Turn, ...]
    text: str  # the response as text, including tool results, and beginning with a `<think>` that the prompt may have opened
    finish_reason: FinishReason
    duration_s: float = 0.0
    error: str = ""  # for people; not empty exactly if it `failed`
    error_kind: EpisodeError | None = None  # not None exactly if finish_reason is "error"

    @property
    def failed(self) -> bool:
        """Whether it ended by something that the policy didn't cause. There is no answer and nothing to reward then."""
        return self.finish_reason in ("error", "deadline")

    @property
    def opening(self) -> str:
        """The part of `text` whose tokens are in the prompt: `<think>`, if the chat template opens it."""
        return self.text[: self.text.find(self.turns[0].text)] if self.turns and self.turns[0].text in self.text else ""

    @property
    def num_tool_calls(self) -> int:
        return sum(turn.tool_call is not None for turn in self.turns)

    @property
    def num_generated_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))  # many times faster than a sum of booleans

    @property
    def min_policy_version(self) -> int | None:
        """The oldest policy version that wrote a part of this trajectory; None if nothing was sampled."""
        return min((s.policy_version for s in self.segments if s.end > s.start), default=None)


NoVerdict = Literal["too_long", "timeout", "died", "failed"]
"""Why answers couldn't be compared: one was too long, or math-verify missed its deadline, died or raised an exception."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A trajectory's reward with a breakdown for people: total = Σ parts."""

    total: float
    parts: dict[str, float]  # weighted contributions, by name
    correct: bool
    format_ok: bool
    notes: tuple[str, ...] = ()  # such as the format rule that was broken
    no_verdict: NoVerdict | None = None  # why the answer couldn't be compared, so that it counts as wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The trajectories sampled for one task under one lease. `rewards` is empty until they are scored, then one for each."""

    lease_id: str
    task: Task
    trajectories: tuple[Trajectory, ...]
    rewards: tuple[Reward, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def min_policy_version(self) -> int | None:
        return min((v for t in self.trajectories if (v := t.min_policy_version) is not None), default=None)
