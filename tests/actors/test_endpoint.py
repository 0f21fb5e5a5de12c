"""Repair by an HTTP endpoint against a real server: a good repair message by message, and everything a server does wrong."""

import asyncio
import time
from collections.abc import Callable

import pytest
from chat_server import BUSY, ChatServer, Reply, chat_server
from repair_cases import ANSWER, CALL, GOOD, OK, RESULT, TASK, WRONG, make_request
from tiny_qwen3 import build_tokenizer

from actors.config import EndpointConfig, EpisodeConfig, RepairConfig
from actors.repair.attempts import repair, repair_all
from actors.repair.endpoint import Endpoint, EndpointError, as_stopped, on_endpoint
from actors.repair.types import RepairRequest, RepairResult
from rewards.config import QualityConfig, RewardConfig
from trajectory.types import ToolCall, ToolResult

TOKENIZER = build_tokenizer()
EPISODE = EpisodeConfig(system_prompt="Use the tags.")
CONFIG = RepairConfig(wrong_prompt="Fix. {question}\n{trajectory}", temperatures=(0.5, 1.0))
# What a server that drops stop strings sends of `GOOD`.
CALL_CUT, ANSWER_CUT = CALL.removesuffix("</code>"), ANSWER.removesuffix("</answer>")


class Tool:
    def __init__(self, result: ToolResult = OK) -> None:
        self._result = result
        self.called: list[ToolCall] = []

    async def __call__(self, call: ToolCall, timeout_s: float) -> ToolResult:
        self.called.append(call)
        return self._result


async def repaired(
    server: ChatServer | str, *, tool: Tool | None = None, request: RepairRequest | None = None, **settings: object
) -> RepairResult:
    url = server if isinstance(server, str) else server.url
    config = EndpointConfig(base_url=url, model="big", **{"max_retries": 1, **settings})
    endpoint = Endpoint(config)
    attempt = on_endpoint(endpoint, TOKENIZER, tool or Tool(), EPISODE, max_concurrent_attempts=8)
    try:
        return await repair(
            request or make_request(),
            attempt=attempt,
            config=CONFIG,
            quality_config=QualityConfig(),
            reward_config=RewardConfig(),
        )
    finally:
        await endpoint.close()


def reasons(result: RepairResult) -> list[str]:
    return [attempt.reason for attempt in result.attempts]


async def test_a_repair_message_by_message() -> None:
    tool = Tool()
    with chat_server(CALL_CUT, ANSWER_CUT) as server:
        result = await repaired(server, tool=tool)
    assert reasons(result) == [""]
    accepted = result.accepted
    assert accepted is not None
    assert accepted.text == GOOD
    assert tool.called == [ToolCall(tool="python", content="print(17 * 23)")]

    first, second = server.asked
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("big", 0.5, 2048)
    assert first["stop"] == ["</code>", "</search>", "</answer>"]
    assert first["messages"] == [
        {"role": "system", "content": "Use the tags."},
        {"role": "user", "content": f"Fix. {TASK.question}\n{WRONG}"},
    ]
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": CALL},
        {"role": "user", "content": "<result>\n391\n</result>\nContinue."},
    ]
    # The policy's tokens, piece by piece; the result carries no loss; nobody's logprobs.
    parts = [TOKENIZER.encode(part, add_special_tokens=False) for part in (CALL, RESULT, ANSWER)]
    assert accepted.response_ids.tolist() == [token for part in parts for token in part]
    assert accepted.loss_mask.sum() == len(parts[0]) + len(parts[2])
    assert not accepted.loss_mask[len(parts[0]) : len(parts[0]) + len(parts[1])].any()
    assert not accepted.logprobs.any()
    assert len(accepted.logprobs) == len(accepted.response_ids)
    assert accepted.segments == ()
    assert accepted.prompt_ids.tolist() == [5, 6, 7]


@pytest.mark.parametrize("kept", [(CALL, ANSWER), (CALL + "\n<result>\n1\n</result>", ANSWER + " And more.")])
async def test_servers_that_keep_or_ignore_stop_strings(kept: tuple[str, str]) -> None:
    with chat_server(*kept) as server:
        result = await repaired(server)
    assert result.accepted is not None
    assert result.accepted.text == GOOD


# --- what it writes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        (["The answer is 391."], "unparseable"),
        (["<think>It is 391.</think><answer>391"], "unparseable"),  # no \boxed{}
        (["</think></think><answer>\\boxed{391}"], "unparseable"),
        (["<think>I multiply 17 by 23 and"], "unclosed_tag"),
        (["<think>I multiply.<answer>\\boxed{391}"], "unclosed_tag"),
        ([ANSWER_CUT], "no_tools"),
        ([CALL_CUT.replace("23", "24"), ANSWER_CUT.replace("391", "408")] * 2, "copy"),
        (["<think>a</think>\n<result>\n391\n</result>\n" + ANSWER_CUT], "forged_result"),
        ([CALL_CUT, "\n<result>\n391\n</result>\n" + ANSWER_CUT] * 2, "forged_result"),
        ([CALL_CUT, ANSWER_CUT.replace("{391}", "{392}")] * 2, "wrong_answer"),
        ([Reply("<think>on and on", finish_reason="length")], "too_long"),
        (["<think>" + "ab " * 2000], "too_long"),  # more tokens than allowed, whatever the server counts
        ([""], "unparseable"),
    ],
)
async def test_bad_writing_is_named(replies: list[Reply | str], reason: str) -> None:
    tool = Tool(OK if reason != "copy" else ToolResult(status="ok", output="408"))
    request = make_request(WRONG.replace("by 23", "by 24")) if reason == "copy" else None
    with chat_server(*replies) as server:
        result = await repaired(server, tool=tool, request=request)
    assert reasons(result) == [reason] * 2
    assert result.accepted is None


async def test_control_tokens_in_a_reply_are_only_text() -> None:
    with chat_server(CALL_CUT.replace("I multiply", "<|im_end|> I multiply"), ANSWER_CUT) as server:
        result = await repaired(server)
    assert result.accepted is not None
    assert "< |im_end|>" in result.accepted.text
    assert TOKENIZER.eos_token_id not in result.accepted.response_ids
    assert server.asked[1]["messages"][2]["content"] in result.accepted.text, "it sees what is kept"


# --- how it fails -------------------------------------------------------------------------------------------------------


async def test_rate_limited_then_fine() -> None:
    with chat_server(BUSY, CALL_CUT, BUSY, ANSWER_CUT) as server:
        result = await repaired(server)
    assert reasons(result) == [""]
    assert len(server.asked) == 4


async def test_down() -> None:
    result = await repaired("http://127.0.0.1:1/v1")
    assert reasons(result) == ["endpoint_down"]
    expected = r"EndpointDown: the endpoint http://127.0.0.1:1/v1 (big) can't be reached, after 1 retries"
    assert result.attempts[0].error.startswith(expected)
    assert result.outage == "endpoint_down"


FOREVER_500 = Reply(status=500, body="oops", headers={"retry-after-ms": "10"})


@pytest.mark.parametrize(
    ("reply", "reason", "num_asked", "words"),
    [
        (BUSY, "rate_limited", 2, "refused for its rate limit, after 1 retries: Error code: 429"),
        (FOREVER_500, "endpoint_down", 2, "answered 500, after 1 retries"),
        (Reply(status=401, body='{"error": "who?"}'), "endpoint_refused", 1, "answered 401: Error code: 401"),
        (Reply("", finish_reason="content_filter"), "endpoint_refused", 1, "filtered its reply out"),
    ],
)
async def test_refusals_end_the_repair(reply: Reply, reason: str, num_asked: int, words: str) -> None:
    with chat_server(reply) as server:
        result = await repaired(server)
    assert reasons(result) == [reason]
    assert words in result.attempts[0].error
    assert len(server.asked) == num_asked


@pytest.mark.parametrize("body", ["<html>hello</html>", "{}", '{"choices": []}', '{"choices": [{"message": {}}]}', ""])
@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
async def test_what_is_no_completion(body: str, content_type: str) -> None:
    with chat_server(Reply(body=body, headers={"content-type": content_type})) as server:
        result = await repaired(server)
    assert reasons(result) == ["endpoint_garbled"] * 2
    assert "sent something other than a completion" in result.attempts[0].error


async def test_a_silent_server() -> None:
    with chat_server(Reply(CALL_CUT, silent_s=30)) as server:
        started = time.monotonic()
        result = await repaired(server, timeout_s=0.2)
        assert time.monotonic() - started < 5
    assert reasons(result) == ["endpoint_timeout"]
    assert "was silent for endpoint.timeout_s = 0.2 s, after 1 retries" in result.attempts[0].error


async def test_a_server_that_dribbles() -> None:
    """Every byte comes in time; the whole never would."""
    with chat_server(Reply(CALL_CUT, dribble_s=0.1)) as server:
        result = await repaired(server, timeout_s=5, deadline_s=0.5)
    assert reasons(result) == ["endpoint_timeout"]
    assert "gave no completion within endpoint.deadline_s = 0.5 s" in result.attempts[0].error


async def test_a_rate_limit_longer_than_the_deadline_is_called_so() -> None:
    with chat_server(Reply(status=429, body="{}", headers={"retry-after": "60"})) as server:
        result = await repaired(server, deadline_s=0.5)
    assert reasons(result) == ["rate_limited"]
    assert "it last refused for its rate limit" in result.attempts[0].error


async def test_concurrency_is_bounded() -> None:
    with chat_server(Reply(ANSWER_CUT, silent_s=0.1)) as server:
        endpoint = Endpoint(EndpointConfig(base_url=server.url, model="big", concurrency=3))
        attempt = on_endpoint(endpoint, TOKENIZER, Tool(), EPISODE, max_concurrent_attempts=100)
        results = await repair_all(
            [make_request()] * 9,
            0,
            attempt=attempt,
            config=CONFIG,
            quality_config=QualityConfig(),
            reward_config=RewardConfig(),
        )
        assert endpoint.num_requests_in_flight == 0
        assert endpoint.num_generated_tokens == 7 * 18
        await endpoint.close()
    assert [reasons(result) for result in results] == [["no_tools"] * 2] * 9
    assert server.most_busy == 3


async def test_cancelling_hangs_up() -> None:
    with chat_server(Reply(CALL_CUT, silent_s=30)) as server:
        task = asyncio.create_task(repaired(server))
        assert await asyncio.to_thread(server.was_asked.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)


# --- the key ------------------------------------------------------------------------------------------------------------


async def test_the_key_comes_from_the_named_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-you")
    monkeypatch.setenv("REPAIR_KEY", "sesame")
    with chat_server(ANSWER_CUT) as server:
        await repaired(server, api_key_env="REPAIR_KEY")
        await repaired(server)
    assert set(server.keys[:2]) == {"Bearer sesame"}
    assert set(server.keys[2:]) == {"Bearer none"}


def test_a_key_that_is_not_there_is_missed_at_once() -> None:
    config = EndpointConfig(base_url="http://127.0.0.1:1/v1", model="big", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ValueError, match=r"endpoint\.api_key_env = 'NO_SUCH_KEY': no such environment variable"):
        Endpoint(config, environ={})


async def test_errors_do_not_show_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPAIR_KEY", "sesame")
    with chat_server(Reply(status=401, body='{"error": "no"}')) as server:
        result = await repaired(server, api_key_env="REPAIR_KEY")
    assert "sesame" not in result.attempts[0].error


# --- stop strings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "closed_by_stop", "expected"),
    [
        ("<think>a</think><code>1", True, ("<think>a</think><code>1</code>", True)),
        ("<search>who", True, ("<search>who</search>", True)),
        ("<answer>5", True, ("<answer>5</answer>", True)),
        ("<answer>5", False, ("<answer>5", False)),
        ("<think>a", True, ("<think>a", False)),
        ("<code>1</code><answer>5</answer>", True, ("<code>1</code>", True)),
        ("<code>1</code> and", False, ("<code>1</code>", True)),
        ("5", True, ("5", False)),
        ("", True, ("", False)),
    ],
)
def test_as_stopped(text: str, closed_by_stop: bool, expected: tuple[str, bool]) -> None:
    assert as_stopped(text, closed_by_stop=closed_by_stop) == expected


async def test_a_completion_without_tools_or_episodes() -> None:
    """As a judge asks."""
    with chat_server("Yes.", FOREVER_500) as server:
        endpoint = Endpoint(EndpointConfig(base_url=server.url, model="big", max_retries=0))
        ask: Callable = lambda: endpoint.complete([{"role": "user", "content": "?"}], max_tokens=5, temperature=0.0)  # noqa: E731
        assert (await ask()).text == "Yes."
        assert "stop" not in server.asked[0]
        with pytest.raises(EndpointError):
            await ask()
        await endpoint.close()
