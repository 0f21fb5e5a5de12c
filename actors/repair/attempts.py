"""Repair of one bad trajectory: a model gets it with its problems and tries again with its tools. The result is judged.

    RepairRequest ──prompt──▶ attempt (an episode) ──verdict──▶ accepted
                                 ▲                     │ a named reason
                                 └── warmer ◀──────────┘──none left──▶ hard case

Pure asyncio: the function that makes an attempt is an argument. Text of a model, old or new, is hostile.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actors.config import EpisodeConfig, RepairConfig
from actors.episode import Encode
from actors.repair.render import render_repair_prompt
from actors.repair.types import OUTAGES, Attempt, AttemptFn, PromptTooLong, Reason, RepairRequest, RepairResult
from actors.sampler import Sampler
from rewards import outcome, quality
from rewards.config import QualityConfig, RewardConfig
from rewards.quality import Quality
from trajectory import markup
from trajectory.chat import Tokenizer, render_prompt, without_opening
from trajectory.records import split_response
from trajectory.types import Task, Trajectory, Turn

_LIMITS: dict[str, Reason] = {
    "length": "too_long",
    "turn_limit": "too_many_turns",
    "tool_limit": "too_many_calls",
    "deadline": "deadline",
}


async def repair_all(
    requests: Sequence[RepairRequest],
    seed: int,
    *,
    attempt: AttemptFn,
    config: RepairConfig,
    quality_config: QualityConfig,
    reward_config: RewardConfig,
    encode: Encode | None = None,
) -> list[RepairResult]:
    """Call `repair` for all requests at the same time; results in their order. `attempt` bounds how many run at once."""
    return await asyncio.gather(
        *(
            repair(
                request,
                attempt=attempt,
                config=config,
                quality_config=quality_config,
                reward_config=reward_config,
                seed=_seed(seed, number),
                encode=encode,
            )
            for number, request in enumerate(requests)
        )
    )


async def repair(
    request: RepairRequest,
    *,
    attempt: AttemptFn,
    config: RepairConfig,
    quality_config: QualityConfig,
    reward_config: RewardConfig,
    seed: int = 0,
    encode: Encode | None = None,
) -> RepairResult:
    """Make attempts at `config.temperatures` until one is accepted, within `config.deadline_s`.

    `encode` is the policy's tokenizer if another model repairs. None: the attempt already has the policy's tokens.
    """
    prompt = render_repair_prompt(request, config)
    attempts: list[Attempt] = []
    try:
        async with asyncio.timeout(config.deadline_s) as limit:
            for number, temperature in enumerate(config.temperatures):
                try:
                    trajectory = await attempt(request.task, prompt, _seed(seed, number), temperature)
                except PromptTooLong as error:
                    attempts.append(_failed("prompt_too_long", temperature, str(error)))
                    break
                # In a thread, as the comparison of two answers may start a process and take seconds.
                reason, found = await asyncio.to_thread(
                    verdict, trajectory, request, config, quality_config, reward_config
                )
                attempts.append(
                    Attempt(
                        reason=reason or "",
                        quality=found,
                        text=trajectory.text,
                        temperature=temperature,
                        error=trajectory.error,
                    )
                )
                if reason is None:
                    accepted = as_answer(trajectory, request.trajectory, encode)
                    return RepairResult(accepted=accepted, quality=found, attempts=tuple(attempts))
                if reason in OUTAGES:
                    break
    except TimeoutError:
        if not limit.expired():
            raise
        message = f"the repair was not done within repair.deadline_s = {config.deadline_s:g} s"
        attempts.append(_failed("deadline", config.temperatures[len(attempts)], message))
    return RepairResult(accepted=None, quality=None, attempts=tuple(attempts))


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _failed(reason: Reason, temperature: float, error: str) -> Attempt:
    return Attempt(reason=reason, quality=None, text="", temperature=temperature, error=error)


# --- the verdict ------------------------------------------------------------------------------------------------------


def verdict(
    trajectory: Trajectory,
    request: RepairRequest,
    config: RepairConfig,
    quality_config: QualityConfig,
    reward_config: RewardConfig,
) -> tuple[Reason | None, Quality | None]:
    """Why an attempt is not accepted, or None if it is; and its quality, if it was computed. May block for
    `reward_config.math_timeout_s` for each gold answer."""
    reason = _why_not(trajectory, request, config)
    if reason is not None:
        return reason, None
    answer = markup.final_answer(trajectory.text)
    if not outcome.score_answer(answer, request.task, reward_config.math_timeout_s).correct:
        return "wrong_answer", None
    found = quality.assess(trajectory, request.task, request.quality.ideal_num_words, quality_config)
    if request.correct:
        good = found.score >= quality_config.accept_right_from
    else:
        good = found.score > quality_config.accept_wrong_above
    return (None if good else "low_quality"), found


def _why_not(trajectory: Trajectory, request: RepairRequest, config: RepairConfig) -> Reason | None:
    """The reason to refuse an attempt that can be found without its answer."""
    if trajectory.error_kind is not None:
        return trajectory.error_kind
    if "".join(trajectory.text.split()) == "".join(request.trajectory.text.split()):
        return "copy"
    if any(markup.contains_forged_result(turn.text) for turn in trajectory.turns):
        return "forged_result"
    if (limit := _LIMITS.get(trajectory.finish_reason)) is not None:
        return limit
    if (broken := _broken_markup(trajectory)) is not None:
        return broken
    if request.trajectory.opening and not trajectory.text.lstrip().startswith("<think>"):
        return "unparseable"  # the policy's prompt already has the tag and continues inside it
    results = [turn.tool_result for turn in trajectory.turns if turn.tool_result is not None]
    if not results and (config.require_tools or request.trajectory.num_tool_calls):
        return "no_tools"
    return None


def _broken_markup(trajectory: Trajectory) -> Reason | None:
    blocks = markup.parse(trajectory.text)
    if any(not block.closed for block in blocks):
        return "unclosed_tag"
    problems = markup.validate(trajectory.text)
    if problems == ("no_answer",):
        return "no_answer"
    return "unparseable" if problems or trajectory.finish_reason == "malformed" else None


def as_answer(repaired: Trajectory, original: Trajectory, encode: Encode | None) -> Trajectory:
    """An accepted repair as an answer to the original's prompt. No policy sampled it there, so it has no logprobs."""
    if encode is not None:
        repaired = _retokenised(repaired, original.opening, encode)
    return replace(
        repaired,
        task_id=original.task_id,
        index=original.index,
        prompt_ids=original.prompt_ids,
        logprobs=np.zeros(len(repaired.response_ids), np.float32),
        segments=(),
    )


def _retokenised(trajectory: Trajectory, opening: str, encode: Encode) -> Trajectory:
    """The same text in another tokenizer's tokens, piece by piece, as an episode makes them after a prompt that ends with
    `opening`."""
    ids: list[int] = []
    mask: list[bool] = []
    turns: list[Turn] = []
    reply = without_opening(trajectory.text, opening)
    for text, by_model in split_response(reply):
        start, piece = len(ids), encode(text)
        ids += piece
        mask += [by_model] * len(piece)
        if by_model:
            turn = trajectory.turns[len(turns)]
            assert not turns or turn.text == text, "an accepted trajectory has one piece a turn"
            turns.append(replace(turn, text=text, start=start, end=len(ids), result_end=len(ids)))
        else:
            turns[-1] = replace(turns[-1], result_end=len(ids))
    return replace(
        trajectory,
        text=opening + reply,
        response_ids=np.array(ids, np.int32),
        loss_mask=np.array(mask, np.bool_),
        turns=tuple(turns),
    )


# --- functions that make attempts -----------------------------------------------------------------------------------------


def on_engine(sampler: Sampler, tokenizer: Tokenizer, episode: EpisodeConfig, max_prompt_tokens: int) -> AttemptFn:
    """Attempts by the engine of `sampler`, whose tokenizer is `tokenizer`."""
    serial = itertools.count()

    async def attempt(task: Task, prompt: str, seed: int, temperature: float) -> Trajectory:
        prompt_ids = render_prompt(tokenizer, prompt, episode.system_prompt)
        if len(prompt_ids) > max_prompt_tokens:
            raise PromptTooLong(f"the repair prompt has {len(prompt_ids)} tokens, and the limit is {max_prompt_tokens}")
        return await sampler.attempt(task, prompt_ids, f"repair-{next(serial)}/{task.id}", seed, temperature)

    return attempt
