"""One attempt at a question: generate, run the requested tool, append its result, and repeat.

    prompt ─▶ generate ──</answer>, end of sequence or a limit──▶ Trajectory
                ▲   │ </code>, </search>
                │   ▼
      result tokens (loss mask 0) ◀── call_tool

The engine's sampled tokens are used for training as they are; only the environment's text is tokenised here. Pure
asyncio: the functions that call the engine and the sandbox are arguments.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from actors.config import EpisodeConfig
from actors.engine.protocol import EngineError, Generation
from trajectory.markup import contains_forged_result, render_result, trailing_tool_call
from trajectory.types import EpisodeError, FinishReason, Segment, Task, ToolCall, ToolResult, Trajectory, Turn

logger = logging.getLogger(__name__)

Generate = Callable[[Sequence[int], int], Awaitable[Generation]]
"""`await generate(token_ids, max_tokens)`: the engine's continuation of all tokens so far. It raises `EngineError`."""

CallTool = Callable[[ToolCall, float], Awaitable[ToolResult]]
"""`await call_tool(call, timeout_s)`. A failure is a `ToolResult` and never an exception."""

_LIMITS = ("timeout", "output_limit", "memory")
"""Statuses whose message says which limit the code reached, so that the model can write other code."""

Encode = Callable[[str], list[int]]
"""Token ids of a text as it is, without special tokens."""


async def run(
    task: Task,
    prompt_ids: Sequence[int],
    index: int,
    *,
    generate: Generate,
    call_tool: CallTool,
    encode: Encode,
    config: EpisodeConfig,
    opening: str = "",
) -> Trajectory:
    """Sample the trajectory `index` of `task`.

    It always returns one. Errors and the deadline end it with what was sampled so far, and `Trajectory.error` names them.
    Only cancellation is raised. `opening` is the part of the reply that the prompt already has (see `chat.prompt_opening`);
    the trajectory's text begins with it.
    """
    started = time.monotonic()
    response = _Response(text=opening)
    error = ""
    error_kind: EpisodeError | None = None
    try:
        async with asyncio.timeout(config.deadline_s):
            finish_reason = await _converse(prompt_ids, response, generate, call_tool, encode, config)
    except TimeoutError:
        finish_reason = "deadline"
        error = f"episode waited on {response.waiting_for} at its deadline of {config.deadline_s:g} s"
    except Exception as failure:
        # Only here does a failure become data: an episode must never abort the others of its group, or the step.
        error_kind = failure.kind if isinstance(failure, EngineError | ToolUnavailable) else "episode_error"
        if error_kind == "episode_error" and not isinstance(failure, ValueError):
            logger.exception("episode %d of task %s failed while waiting for %s", index, task.id, response.waiting_for)
        finish_reason, error = "error", f"{type(failure).__name__}: {failure}"
    return Trajectory(
        task_id=task.id,
        index=index,
        prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
        response_ids=np.asarray(response.token_ids, dtype=np.int32),
        loss_mask=np.asarray(response.loss_mask, dtype=np.bool_),
        logprobs=np.asarray(response.logprobs, dtype=np.float32),
        segments=tuple(response.segments),
        turns=tuple(response.turns),
        text=response.text,
        finish_reason=finish_reason,
        duration_s=time.monotonic() - started,
        error=error,
        error_kind=error_kind,
    )


class ToolUnavailable(Exception):
    """Nobody ran a tool call. That is not the policy's doing, so there is nothing to learn from the episode."""

    kind: ClassVar[EpisodeError] = "tool_unavailable"


@dataclass(slots=True)
class _Response:
    """The response so far. The first three lists have one entry for each token."""

    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    text: str = ""
    waiting_for: str = "the engine"

    def append_sampled(self, generation: Generation) -> None:
        offset = len(self.token_ids)
        self.token_ids += generation.token_ids
        self.loss_mask += [True] * len(generation.token_ids)
        self.logprobs += generation.logprobs
        self.text += generation.text
        for segment in generation.segments:
            start, end, version = offset + segment.start, offset + segment.end, segment.policy_version
            self.segments.append(Segment(start=start, end=end, policy_version=version))

    def append_result(self, text: str, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        self.loss_mask += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)
        self.text += text


async def _converse(
    prompt_ids: Sequence[int],
    response: _Response,
    generate: Generate,
    call_tool: CallTool,
    encode: Encode,
    config: EpisodeConfig,
) -> FinishReason:
    if len(prompt_ids) > config.max_prompt_tokens:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens, more than max_prompt_tokens = {config.max_prompt_tokens}"
        )
    num_tool_calls = 0
    while True:
        response.waiting_for = "the engine"
        start, begun = len(response.token_ids), time.monotonic()
        generation = await generate([*prompt_ids, *response.token_ids], config.max_response_tokens - start)
        generate_s = time.monotonic() - begun
        response.append_sampled(generation)
        end = len(response.token_ids)

        call = trailing_tool_call(generation.text)
        refusal = _refusal(generation, call, num_turns=len(response.turns) + 1, num_calls=num_tool_calls, config=config)
        wanted = call if refusal is None else None
        turn = Turn(text=generation.text, start=start, end=end, result_end=end, tool_call=wanted, generate_s=generate_s)
        response.turns.append(turn)
        if wanted is None:
            return refusal or _ending(generation)

        num_tool_calls += 1
        response.waiting_for, begun = f"the tool {wanted.tool}", time.monotonic()
        result = await call_tool(wanted, config.tool_timeout_s)
        if result.status == "unavailable":
            response.turns[-1] = replace(turn, tool_result=result, tool_s=time.monotonic() - begun)
            raise ToolUnavailable(result.message)
        result_text = render_result(_shown(result), config.max_result_chars)
        result_ids = encode(result_text)
        # A result that leaves no room for a reply is useless to the model, and half a `<result>` breaks the grammar.
        fits = end + len(result_ids) < config.max_response_tokens
        if fits:
            response.append_result(result_text, result_ids)
        response.turns[-1] = replace(
            turn, result_end=len(response.token_ids), tool_result=result, tool_s=time.monotonic() - begun
        )
        if not fits:
            return "length"


def _refusal(
    generation: Generation, call: ToolCall | None, *, num_turns: int, num_calls: int, config: EpisodeConfig
) -> FinishReason | None:
    """Why this turn must be the last one even if it requested a tool, which then isn't run. None if it need not be."""
    if contains_forged_result(generation.text):
        return "malformed"
    if call is None:
        return None
    if num_calls >= config.max_tool_calls:
        return "tool_limit"
    return "turn_limit" if num_turns >= config.max_turns else None


def _ending(generation: Generation) -> FinishReason:
    """The meaning of a turn without a tool call."""
    if generation.text.endswith("</answer>"):
        return "answer"
    if generation.finish_reason == "stop_string":  # `</code>` that closes nothing, so no tool was meant
        return "malformed"
    return "length" if generation.finish_reason == "length" else "eos"


def _shown(result: ToolResult) -> str:
    """The text of a result that the model reads. It includes the message about a limit that its code reached. Other messages
    are for people: a model would learn our hosts and clocks from them."""
    output = result.output.strip()
    if result.status == "ok":
        return output or "(no output)"
    advice = f" {result.message}" if result.status in _LIMITS and result.message else ""
    return f"[{result.status}]{advice}\n{output}".strip()
