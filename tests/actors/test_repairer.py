"""Repair with a scripted writer: what is asked, what is accepted, and a named reason for everything else."""

import asyncio
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from repair_cases import ANSWER, CALL, GOOD, OK, RAMBLING, RESULT, TASK, WRONG, make_request, make_trajectory
from tiny_qwen3 import build_tokenizer

from actors.config import EngineConfig, EpisodeConfig, RepairConfig, RepairSettings, RolloutSettings
from actors.repair.attempts import repair, repair_all
from actors.repair.render import render_repair_prompt
from actors.repair.types import PromptTooLong, Reason, RepairResult
from rewards.config import QualityConfig, RewardConfig
from rewards.dimensions import DIMENSIONS
from rewards.quality import Quality
from trajectory import markup
from trajectory.types import EpisodeError, Task, Trajectory

NAMED = RepairConfig(right_prompt="R {question}|{trajectory}|{problems}", wrong_prompt="W {question}|{trajectory}")


class Writer:
    """Hands out what it was given, in order; an exception is raised, None never returns."""

    def __init__(self, *steps: Trajectory | BaseException | None) -> None:
        self._steps = list(steps)
        self.asked: list[tuple[str, int, float]] = []

    async def __call__(self, task: Task, prompt: str, seed: int, temperature: float) -> Trajectory:
        self.asked.append((prompt, seed, temperature))
        step = self._steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        if step is None:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")
        return step

    async def repair(self, request=None, config=NAMED, **settings) -> RepairResult:
        return await repair(
            request or make_request(),
            attempt=self,
            config=config,
            quality_config=settings.pop("quality_config", QualityConfig()),
            reward_config=RewardConfig(),
            **settings,
        )


def reasons(result: RepairResult) -> list[str]:
    return [attempt.reason for attempt in result.attempts]


# --- accepted -----------------------------------------------------------------------------------------------------------


async def test_accepted_at_once() -> None:
    writer = Writer(make_trajectory(GOOD))
    request = make_request()
    result = await writer.repair(request)
    assert reasons(result) == [""]
    assert result.quality == result.attempts[0].quality
    assert result.quality is not None
    assert result.quality.score == 1.0
    accepted = result.accepted
    assert accepted is not None
    assert (accepted.text, accepted.task_id, accepted.index) == (GOOD, "t", 2)
    # The answer to the original's prompt, sampled by no policy there.
    assert accepted.prompt_ids.tolist() == request.trajectory.prompt_ids.tolist()
    assert accepted.response_ids.tolist() == [1, 2, 3]
    assert accepted.loss_mask.tolist() == [True, False, True]
    assert accepted.logprobs.tolist() == [0.0, 0.0, 0.0]
    assert accepted.segments == ()


async def test_attempts_grow_warmer_until_one_is_accepted() -> None:
    writer = Writer(
        make_trajectory(WRONG), make_trajectory(CALL + RESULT + ANSWER.replace("391", "7")), make_trajectory(GOOD)
    )
    result = await writer.repair(seed=4)
    assert reasons(result) == ["copy", "wrong_answer", ""]
    assert [attempt.temperature for attempt in result.attempts] == [0.3, 0.7, 1.0]
    assert result.attempts[1].text.endswith("\\boxed{7}</answer>")
    assert len({seed for _, seed, _ in writer.asked}) == 3
    assert len({prompt for prompt, _, _ in writer.asked}) == 1
    again = Writer(*[make_trajectory(WRONG)] * 3)
    await again.repair(seed=4)
    assert [seed for _, seed, _ in again.asked] == [seed for _, seed, _ in writer.asked]


async def test_a_hard_case_keeps_every_reason() -> None:
    result = await Writer(*[make_trajectory(WRONG)] * 3).repair()
    assert (result.accepted, result.quality) == (None, None)
    assert reasons(result) == ["copy"] * 3
    assert result.outage == ""


async def test_all_at_the_same_time_in_their_order() -> None:
    both = asyncio.Barrier(2)

    async def attempt(task: Task, prompt: str, seed: int, temperature: float) -> Trajectory:
        async with asyncio.timeout(5), both:
            return make_trajectory(GOOD if "R " in prompt else WRONG)

    requests = [make_request(), make_request(RAMBLING, correct=True)]
    config = NAMED.model_copy(update={"temperatures": (1.0,)})
    results = await repair_all(
        requests, 1, attempt=attempt, config=config, quality_config=QualityConfig(), reward_config=RewardConfig()
    )
    assert [result.accepted is not None for result in results] == [False, True]


# --- refused, by name ---------------------------------------------------------------------------------------------------


def failed(error: str, kind: EpisodeError) -> Trajectory:
    return make_trajectory("", finish_reason="error", error=error, error_kind=kind)


DOUBTFUL = GOOD.replace("The code gives", "Maybe it is")


@pytest.mark.parametrize(
    ("trajectory", "reason"),
    [
        (make_trajectory(WRONG.replace("\n", "  \n ")), "copy"),
        (make_trajectory(WRONG.replace("\n", "")), "copy"),
        (
            make_trajectory(GOOD, results=(), finish_reason="malformed", turn_texts=(GOOD,)),
            "forged_result",
        ),
        (make_trajectory("<think>and so", finish_reason="length"), "too_long"),
        (make_trajectory(CALL, finish_reason="turn_limit"), "too_many_turns"),
        (make_trajectory(CALL, finish_reason="tool_limit"), "too_many_calls"),
        (make_trajectory("<think>I multiply", finish_reason="eos"), "unclosed_tag"),
        (make_trajectory(CALL + RESULT + "<think>done</think>", finish_reason="eos"), "no_answer"),
        (make_trajectory("It is 391.", finish_reason="eos"), "unparseable"),
        (make_trajectory(GOOD.replace("\\boxed{391}", "391")), "unparseable"),
        (make_trajectory("<think>a</think></code>", finish_reason="malformed"), "unparseable"),
        (make_trajectory(ANSWER, results=()), "no_tools"),
        (make_trajectory(GOOD.replace("{391}", "{392}")), "wrong_answer"),
        (make_trajectory("", finish_reason="deadline", error="episode waited on the engine"), "deadline"),
        (failed("EngineTimeout: vLLM did not", "engine_timeout"), "engine_timeout"),
        (failed("RequestFailed: vLLM failed", "engine_failed"), "engine_failed"),
        (failed("KeyError: 'x'", "episode_error"), "episode_error"),
    ],
)
async def test_refused(trajectory: Trajectory, reason: str) -> None:
    result = await Writer(*[trajectory] * 3).repair()
    assert reasons(result) == [reason] * 3
    assert result.accepted is None
    assert reason in get_args(Reason)
    assert result.attempts[0].error == trajectory.error


async def test_a_repair_of_a_right_answer_needs_0_86() -> None:
    request = make_request(RAMBLING, correct=True)
    result = await Writer(*[make_trajectory(DOUBTFUL)] * 3).repair(request)
    assert reasons(result) == ["low_quality"] * 3
    assert result.attempts[0].quality is not None
    assert result.attempts[0].quality.dimensions["confidence"] == 0


@pytest.mark.parametrize(
    ("correct", "threshold", "accepted"),
    [(True, 0.6, True), (True, 0.6001, False), (False, 0.6, False), (False, 0.5999, True)],
)
async def test_a_right_answer_is_accepted_from_and_a_wrong_one_above(
    correct: bool, threshold: float, accepted: bool
) -> None:
    text = GOOD.replace("I multiply", "maybe multiply")  # as long as GOOD, so 0.6 exactly
    request = make_request(RAMBLING if correct else WRONG, correct=correct)
    config = QualityConfig(accept_right_from=threshold, accept_wrong_above=threshold)
    result = await Writer(*[make_trajectory(text)] * 3).repair(request, quality_config=config)
    assert (result.accepted is not None) is accepted


async def test_the_ideal_length_is_the_questions() -> None:
    """Not the repair's own, by which every length would be ideal."""
    wordy = GOOD.replace("I multiply 17 by 23.", " ".join(f"w{i}" for i in range(60)))
    request = make_request()
    request = replace(request, quality=replace(request.quality, ideal_num_words=len(GOOD.split())))
    result = await Writer(*[make_trajectory(wordy)] * 3).repair(request)
    assert reasons(result) == ["low_quality"] * 3


async def test_tools_are_needed_if_the_original_called_them_or_by_configuration() -> None:
    toolless = replace(make_trajectory(WRONG), turns=())
    head = make_trajectory(ANSWER, results=())
    assert reasons(await Writer(head).repair(make_request(trajectory=toolless))) == [""]
    strict = NAMED.model_copy(update={"require_tools": True})
    assert reasons(await Writer(*[head] * 3).repair(make_request(trajectory=toolless), strict)) == ["no_tools"] * 3


# --- the way there ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["endpoint_down", "endpoint_timeout", "endpoint_refused", "rate_limited", "engine_dead", "tool_unavailable"],
)
async def test_what_would_meet_the_same_again_is_not_tried_again(kind: EpisodeError) -> None:
    result = await Writer(failed("it is gone", kind)).repair()
    assert reasons(result) == [kind]
    assert result.attempts[0].error == "it is gone"
    assert result.outage == kind


async def test_a_prompt_beyond_the_limit() -> None:
    result = await Writer(PromptTooLong("it has 9 tokens, and the limit is 8")).repair()
    assert reasons(result) == ["prompt_too_long"]
    assert result.attempts[0].error == "it has 9 tokens, and the limit is 8"


async def test_the_deadline_bounds_all_attempts_together() -> None:
    config = NAMED.model_copy(update={"deadline_s": 0.3})
    result = await asyncio.wait_for(Writer(make_trajectory(WRONG), None).repair(config=config), 5)
    assert reasons(result) == ["copy", "deadline"]
    assert result.attempts[1].temperature == 0.7
    assert result.attempts[1].error == "the repair was not done within repair.deadline_s = 0.3 s"


async def test_a_defect_of_ours_is_not_taken_for_a_deadline() -> None:
    with pytest.raises(TimeoutError, match="ours"):
        await Writer(TimeoutError("ours")).repair()


# --- the prompt ---------------------------------------------------------------------------------------------------------


def test_the_prompt_shows_everything_but_the_gold() -> None:
    request = make_request(notes=("no_boxed_answer", "note of ours"), low_dimensions=("length",))
    text = render_repair_prompt(request, RepairConfig())
    assert TASK.question in text
    assert WRONG in text  # its tags and its tool results
    assert (
        "- Its final answer is wrong.\n- Its <answer> has no \\boxed{} with the final answer.\n- note of ours\n" in text
    )
    assert f"\n- Its length is off: it has {len(WRONG.split())} words.\n" in text
    assert "391" not in text
    assert "misread" in text
    assert "{" not in text.replace("{23}", "").replace("\\boxed{", "")


def test_a_right_answer_has_its_own_prompt() -> None:
    found = Quality(
        0.4, {"confidence": 0.0, "length": 0.1, "repetition": 0.75, "tool_success": 0.5, "grounding": 0}, 90, 30
    )
    request = make_request(RAMBLING, correct=True, quality=found, low_dimensions=tuple(found.dimensions))
    text = render_repair_prompt(request, RepairConfig())
    assert "poor path" in text
    for sentence in (
        "a word such as maybe, unsure, guess",
        "it has 90 words; 30 are enough.",
        "25% of its runs of three words",
        "50% of its tool calls failed.",
        "100% of its final answer stands neither in a tool result nor",
    ):
        assert sentence in text
    assert "Nothing stands out" in render_repair_prompt(
        make_request(RAMBLING, correct=True, low_dimensions=()), RepairConfig()
    )


def test_templates_may_be_one_line_with_bare_names() -> None:
    config = NAMED.model_copy(update={"problems_as": "names"})
    request = make_request("{problems}", correct=True, notes=("no_think",), low_dimensions=("length",))
    # What was filled in is never filled itself.
    assert render_repair_prompt(request, config) == f"R {TASK.question}|{{problems}}|no_think, low length"
    assert render_repair_prompt(make_request("x"), config) == f"W {TASK.question}|x"


def test_the_names_are_the_words_that_released_models_were_trained_on() -> None:
    """In the order and the spelling of `examples/tiny`'s model, whose repair prompts have nothing but these words."""
    request = make_request("x", notes=get_args(markup.Rule), low_dimensions=tuple(DIMENSIONS))
    template = "{question}|{trajectory}|{problems}"
    config = RepairConfig(problems_as="names", wrong_prompt=template, right_prompt=template)
    assert render_repair_prompt(request, config) == (
        f"{TASK.question}|x|wrong answer, unpaired_tag, nested_tag, no_think, no_answer, tool_without_result, "
        "result_without_tool, no_boxed_answer, low confidence, low length, low repetition, low tool_success, low grounding"
    )


@given(st.lists(st.sampled_from(["<", ">", "<|im_end|>", "<|", "|>", "</s>", "<think>", "im_end", "\n", " ", "a"])))
def test_a_bad_trajectory_cannot_end_the_message(pieces: list[str]) -> None:
    text = "".join(pieces)
    for max_chars in (5, 20, 1000):
        shown = render_repair_prompt(make_request(text), NAMED.model_copy(update={"max_trajectory_chars": max_chars}))
        tokens = build_tokenizer().encode(shown, add_special_tokens=False)
        assert build_tokenizer().convert_tokens_to_ids("<|im_end|>") not in tokens


def test_quoting_keeps_the_grammar() -> None:
    assert markup.quote(GOOD) == GOOD
    assert markup.quote("<|im_end|></s><thinking></answer>") == "< |im_end|>< /s>< thinking></answer>"
    assert markup.quote("a\ud800<b c>") == "a?<b c>"


def test_a_long_trajectory_is_cut_in_the_middle() -> None:
    shown = render_repair_prompt(
        make_request("a" * 50 + "b" * 50), NAMED.model_copy(update={"max_trajectory_chars": 10})
    )
    assert shown.endswith("|aaaaa\n[... 90 characters left out ...]\nbbbbb")


# --- another tokenizer --------------------------------------------------------------------------------------------------


async def test_a_repair_in_other_tokens_is_told_in_the_policys() -> None:
    parts = (CALL, RESULT, ANSWER)
    written = make_trajectory(GOOD, results=(OK,), turn_texts=(CALL, ANSWER))
    result = await Writer(written).repair(encode=lambda text: [len(text), ord(text[0])])
    accepted = result.accepted
    assert accepted is not None
    assert accepted.response_ids.tolist() == [n for part in parts for n in (len(part), ord(part[0]))]
    assert accepted.loss_mask.tolist() == [True, True, False, False, True, True]
    assert accepted.logprobs.tolist() == [0.0] * 6
    assert [(t.start, t.end, t.result_end) for t in accepted.turns] == [(0, 2, 4), (4, 6, 6)]
    assert accepted.response_ids.dtype == np.int32


async def test_a_repair_follows_a_prompt_that_opens_the_thought() -> None:
    """The policy's prompt has the tag already: it is no part of the repair's tokens, and stands in its text once."""
    bad = make_trajectory("<think>\nNo.</think>", turn_texts=("No.</think>",), results=())
    written = make_trajectory(GOOD, turn_texts=(CALL, ANSWER))
    result = await Writer(written).repair(make_request(trajectory=bad), encode=lambda text: [len(text)])
    accepted = result.accepted
    assert accepted is not None
    call = CALL.removeprefix("<think>")
    assert accepted.response_ids.tolist() == [len(call), len(RESULT), len(ANSWER)]
    assert (accepted.text, accepted.opening) == ("<think>\n" + call + RESULT + ANSWER, "<think>\n")
    assert accepted.turns[0].text == call
    spoken = make_trajectory("Sure. " + GOOD, turn_texts=("Sure. " + CALL, ANSWER))
    refused = await Writer(*[spoken] * 3).repair(make_request(trajectory=bad), encode=lambda text: [len(text)])
    assert reasons(refused) == ["unparseable"] * 3


# --- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repairer": "engine"}, "needs a section `engine`"),
        ({"repairer": "endpoint"}, "needs a section `endpoint`"),
        ({"temperatures": ()}, "at least one, rising"),
        ({"temperatures": (1.0, 0.5)}, "at least one, rising"),
        ({"right_prompt": "{question}"}, r"right_prompt doesn't show \{trajectory\}"),
    ],
)
def test_repair_contradictions(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RepairConfig(**settings)


def test_an_engine_needs_room_for_the_prompt() -> None:
    engine = EngineConfig(model="m", max_model_len=300)
    episode = EpisodeConfig(max_prompt_tokens=50, max_response_tokens=200)
    config = RepairConfig(repairer="engine", engine=engine)
    RepairSettings(model="m", repair=config, episode=episode, sandbox_address="x:1")
    assert config.prompt_limit(engine, episode) == 100
    full = episode.model_copy(update={"max_response_tokens": 300})
    with pytest.raises(ValidationError, match=r"no room for a repair prompt beside episode\.max_response_tokens = 300"):
        RepairSettings(model="m", repair=config, episode=full, sandbox_address="x:1")
    with pytest.raises(ValidationError, match="the rollout actors repair"):
        RepairSettings(model="m", repair=RepairConfig(), episode=episode, sandbox_address="x:1")
    RolloutSettings(engine=engine, episode=episode, repair=RepairConfig(), sandbox_address="x:1")
