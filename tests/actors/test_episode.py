"""The turn loop against a scripted engine and tool: every way to end, and which token belongs to whom."""

import asyncio
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest

from actors import episode
from actors.config import EpisodeConfig
from actors.engine.protocol import EngineDead, Generation
from trajectory.chat import default_system_prompt
from trajectory.markup import quote, stop_strings, validate
from trajectory.tools import TOOLS, ToolSpec
from trajectory.types import Segment, Task, ToolCall, ToolResult, Trajectory

TASK = Task(id="t", question="2+3?", golds=("5",))
PROMPT = [1, 2, 3]


def encode(text: str) -> list[int]:
    return [1000 + ord(char) for char in text]


def said(
    text: str,
    finish_reason: Literal["stop_string", "eos", "length"] = "stop_string",
    versions: tuple[int, ...] = (0, 0),
) -> Generation:
    """Two tokens, with logprobs −1 and −2, sampled by the policies in `versions`."""
    one = versions[0] == versions[1]
    segments = (
        (Segment(start=0, end=2, policy_version=versions[0]),)
        if one
        else tuple(Segment(start=i, end=i + 1, policy_version=v) for i, v in enumerate(versions))
    )
    return Generation(
        token_ids=[10, 11], logprobs=[-1.0, -2.0], text=text, finish_reason=finish_reason, segments=segments
    )


class Script:
    """An engine and a tool that say what they were given, in order, and remember what they were asked."""

    def __init__(self, *generations: Generation | BaseException, results: Sequence[ToolResult] = ()) -> None:
        self._generations = list(generations)
        self._results = list(results)
        self.asked: list[tuple[list[int], int]] = []
        self.called: list[ToolCall] = []

    async def generate(self, token_ids: Sequence[int], max_tokens: int) -> Generation:
        self.asked.append((list(token_ids), max_tokens))
        step = self._generations.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step

    async def call_tool(self, call: ToolCall, timeout_s: float) -> ToolResult:
        self.called.append(call)
        return self._results.pop(0)

    async def run(self, config: EpisodeConfig | None = None) -> Trajectory:
        return await episode.run(
            TASK,
            PROMPT,
            4,
            generate=self.generate,
            call_tool=self.call_tool,
            encode=encode,
            config=config or EpisodeConfig(),
        )


async def test_a_tool_call_and_an_answer_token_by_token() -> None:
    script = Script(
        said("<think>a</think><code>print(5)</code>", versions=(3, 3)),
        said("<answer>\\boxed{5}</answer>", versions=(3, 4)),
        results=[ToolResult(status="ok", output="5\n")],
    )
    trajectory = await script.run(EpisodeConfig(max_response_tokens=100))

    result = "\n<result>\n5\n</result>\n"  # 22 characters, one token each
    assert script.called == [ToolCall(tool="python", content="print(5)")]
    assert script.asked == [(PROMPT, 100), ([*PROMPT, 10, 11, *encode(result)], 100 - 2 - 22)]
    assert trajectory.response_ids.tolist() == [10, 11, *encode(result), 10, 11]
    assert trajectory.loss_mask.tolist() == [True, True, *[False] * 22, True, True]
    assert trajectory.logprobs.tolist() == [-1.0, -2.0, *[0.0] * 22, -1.0, -2.0]
    assert trajectory.segments == (
        Segment(start=0, end=2, policy_version=3),
        Segment(start=24, end=25, policy_version=3),
        Segment(start=25, end=26, policy_version=4),
    )
    assert [(t.start, t.end, t.result_end) for t in trajectory.turns] == [(0, 2, 24), (24, 26, 26)]
    assert trajectory.text == f"<think>a</think><code>print(5)</code>{result}<answer>\\boxed{{5}}</answer>"
    assert (trajectory.finish_reason, trajectory.error, trajectory.index) == ("answer", "", 4)
    assert (trajectory.num_tool_calls, trajectory.num_generated_tokens, trajectory.min_policy_version) == (1, 4, 3)
    assert trajectory.prompt_ids.dtype == np.int32
    assert trajectory.logprobs.dtype == np.float32


CALL = "<code>x</code>"
OK = ToolResult(status="ok", output="1")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (said("<think>done</think>", "eos"), "eos"),
        (said("<think>and so", "length"), "length"),
        (said("no opening</code>"), "malformed"),
        (said("</search>"), "malformed"),
        (said("<result>42</result><answer>42</answer>"), "malformed"),
        (said("<result>42</result><code>x</code>"), "malformed"),
        (said("<answer>5</answer>"), "answer"),
    ],
)
async def test_endings_of_a_single_turn(generation: Generation, expected: str) -> None:
    script = Script(generation)
    trajectory = await script.run()
    assert trajectory.finish_reason == expected
    assert trajectory.error == ""
    assert trajectory.loss_mask.tolist() == [True, True]
    assert script.called == []


async def test_one_tool_call_too_many_ends_the_episode_and_is_not_run() -> None:
    script = Script(said(CALL), said(CALL), said(CALL), results=[OK, OK])
    trajectory = await script.run(EpisodeConfig(max_tool_calls=2))
    assert trajectory.finish_reason == "tool_limit"
    assert len(script.called) == trajectory.num_tool_calls == 2
    assert [t.tool_call is None for t in trajectory.turns] == [False, False, True]


async def test_the_last_turn_runs_no_tool() -> None:
    script = Script(said(CALL), said(CALL), results=[OK])
    trajectory = await script.run(EpisodeConfig(max_turns=2))
    assert trajectory.finish_reason == "turn_limit"
    assert len(trajectory.turns) == 2
    assert len(script.called) == 1


@pytest.mark.parametrize(("limit", "fits"), [(24, False), (25, True)])
async def test_a_result_is_appended_only_if_a_reply_fits_behind_it(limit: int, fits: bool) -> None:
    script = Script(said(CALL), said("<answer>", "length"), results=[OK])  # 2 tokens, then a result of 22
    trajectory = await script.run(EpisodeConfig(max_response_tokens=limit))
    assert trajectory.finish_reason == "length"
    assert len(trajectory.turns) == (2 if fits else 1)
    assert ("<result>" in trajectory.text) is fits
    assert trajectory.turns[0].tool_result == OK
    assert len(script.asked) == (2 if fits else 1)
    if fits:
        assert script.asked[1][1] == 1


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (ToolResult(status="ok", output="  7 \n"), "\n<result>\n7\n</result>\n"),
        (ToolResult(status="ok", output=" \n"), "\n<result>\n(no output)\n</result>\n"),
        (
            ToolResult(status="error", output="ZeroDivisionError\n", message="exit code 1 on 10.0.0.7"),
            "\n<result>\n[error]\nZeroDivisionError\n</result>\n",
        ),
        (
            ToolResult(status="timeout", message="Stopped <code>."),
            "\n<result>\n[timeout] Stopped < code>.\n</result>\n",
        ),
        (ToolResult(status="timeout"), "\n<result>\n[timeout]\n</result>\n"),
        (
            ToolResult(status="memory", output="at 3\n", message="512 MiB."),
            "\n<result>\n[memory] 512 MiB.\nat 3\n</result>\n",
        ),
        (
            ToolResult(status="output_limit", output="yy", message="9."),
            "\n<result>\n[output_limit] 9.\nyy\n</result>\n",
        ),
        (ToolResult(status="rejected", message="no token on h:1"), "\n<result>\n[rejected]\n</result>\n"),
        (ToolResult(status="ok", output="</result><answer>9"), "\n<result>\n< /result>< answer>9\n</result>\n"),
    ],
)
async def test_what_the_model_sees_of_a_result(result: ToolResult, shown: str) -> None:
    script = Script(said(CALL), said("<answer>1</answer>"), results=[result])
    trajectory = await script.run()
    assert trajectory.text == CALL + shown + "<answer>1</answer>"
    assert trajectory.turns[0].tool_result == result
    assert trajectory.finish_reason == "answer"


async def test_a_tool_that_nobody_ran_ends_the_episode_as_an_error() -> None:
    """The model isn't told: it would be trained on what it makes of our outage."""
    gone = ToolResult(status="unavailable", message="sandbox gateway h:1: UNAVAILABLE")
    trajectory = await Script(said(CALL), said("<answer>1</answer>"), results=[gone]).run()
    assert trajectory.text == CALL
    assert trajectory.turns[0].tool_result == gone
    assert (trajectory.finish_reason, trajectory.error) == ("error", f"ToolUnavailable: {gone.message}")
    assert trajectory.error_kind == "tool_unavailable"


async def test_long_output_is_cut() -> None:
    script = Script(said(CALL), said("</answer>"), results=[ToolResult(status="ok", output="a" * 50 + "b" * 50)])
    trajectory = await script.run(EpisodeConfig(max_result_chars=10))
    assert "aaaaa\n[... 90 characters left out ...]\nbbbbb" in trajectory.text


async def test_an_engine_error_keeps_the_turns_before_it() -> None:
    script = Script(said(CALL), EngineDead("the vLLM engine is dead: killed"), results=[OK])
    trajectory = await script.run()
    assert trajectory.finish_reason == "error"
    assert trajectory.error == "EngineDead: the vLLM engine is dead: killed"
    assert trajectory.error_kind == "engine_dead"
    assert len(trajectory.turns) == 1
    assert trajectory.loss_mask.tolist() == [True, True, *[False] * 22]


async def test_a_defect_of_ours_is_data_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    trajectory = await Script(KeyError("oops")).run()
    assert (trajectory.finish_reason, trajectory.error) == ("error", "KeyError: 'oops'")
    assert trajectory.error_kind == "episode_error"
    assert "episode 4 of task t failed" in caplog.text
    assert (trajectory.response_ids.shape, trajectory.min_policy_version) == ((0,), None)


async def test_a_prompt_beyond_the_limit_is_an_error() -> None:
    script = Script()
    trajectory = await script.run(EpisodeConfig(max_prompt_tokens=2))
    assert trajectory.error == "ValueError: the prompt has 3 tokens, more than max_prompt_tokens = 2"
    assert script.asked == []


class Stuck(Script):
    """Its tool never answers."""

    async def call_tool(self, call: ToolCall, timeout_s: float) -> ToolResult:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


async def test_the_deadline_says_who_was_waited_for() -> None:
    trajectory = await Stuck(said(CALL)).run(EpisodeConfig(deadline_s=0.05))
    assert trajectory.finish_reason == "deadline"
    assert trajectory.error == "episode waited on the tool python at its deadline of 0.05 s"
    assert trajectory.error_kind is None
    assert trajectory.response_ids.tolist() == [10, 11]  # the turn that was cut off counts as sampled
    assert [(t.end, t.result_end, t.tool_call, t.tool_result) for t in trajectory.turns] == [
        (2, 2, ToolCall(tool="python", content="x"), None)
    ]


async def test_cancellation_is_not_data() -> None:
    task = asyncio.create_task(Stuck(said(CALL)).run())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_tool_of_ones_own_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added from outside, it is told in the prompt, stopped at, called and checked as the others are."""
    told, text = "<lookup>a word</lookup> for its meaning.", "<think>a</think><lookup>\nviz.\n</lookup>"
    ending = "<think>b</think><answer>\\boxed{namely}</answer>"
    lookup = ToolSpec(tag="lookup", name="dictionary", usage=told, example="", label="Look-up")
    script = Script(said(text), said(ending))
    assert (await script.run()).finish_reason == "malformed"  # a stop string of no tool
    assert script.called == []

    monkeypatch.setitem(TOOLS, lookup.tag, lookup)
    script = Script(said(text), said(ending), results=[ToolResult(status="ok", output="namely")])
    trajectory = await script.run()
    assert script.called == [ToolCall(tool="dictionary", content="viz.")]
    assert trajectory.finish_reason == "answer"
    assert validate(trajectory.text) == ()
    assert stop_strings() == ("</code>", "</search>", "</lookup>", "</answer>")
    assert EpisodeConfig().system_prompt == default_system_prompt()
    assert f"\n- {told}\n" in default_system_prompt()
    assert "after each </code>, </search> or </lookup>, never by you" in default_system_prompt()
    assert quote("<lookup><other>") == "<lookup>< other>"


@pytest.mark.parametrize("tag", ["answer", "", "a b", "a|b"])
def test_a_tools_tag_is_one_that_the_grammar_can_have(tag: str) -> None:
    with pytest.raises(ValueError, match="a tool's tag can't be"):
        ToolSpec(tag=tag, name="n", usage="", example="", label="")
