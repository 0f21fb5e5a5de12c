"""A repairer behind an OpenAI-compatible chat endpoint: completions with retries, and episodes made of them.

An episode needs an engine that continues tokens. A chat endpoint answers messages, and drops the stop string at which it
stopped. So a turn becomes a message with its tag closed again, and a tool's result becomes the user's next message:

    user: the prompt ─▶ assistant: …<code>…</code> ─▶ user: <result>…</result> Continue. ─▶ assistant: …</answer>

The result is one response as from any episode: turns and tool results in one text, in the policy's tokens, without logprobs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from actors import episode
from actors.config import EndpointConfig, EpisodeConfig
from actors.engine.protocol import EngineError, Generation
from actors.repair.types import AttemptFn
from trajectory import markup
from trajectory.chat import Tokenizer, encode, prompt_messages
from trajectory.records import Message
from trajectory.types import Task, Trajectory

CONTINUE = "Continue."
"""Comes after a tool's result in the user's message."""

MAX_DETAIL_CHARS = 300
"""Most characters of the server's text in an error's message."""


class EndpointError(EngineError):
    """An endpoint did not do what was requested."""


class EndpointDown(EndpointError):
    """The endpoint can't be reached, or it answered only with server errors."""

    kind = "endpoint_down"


class EndpointTimeout(EndpointError):
    """There was no completion within a deadline."""

    kind = "endpoint_timeout"


class RateLimited(EndpointError):
    """The server refused because of the number of requests, up to the last try."""

    kind = "rate_limited"


class EndpointRefused(EndpointError):
    """The server refused the request itself: the key, the model's name, a prompt that is too long."""

    kind = "endpoint_refused"


class EndpointGarbled(EndpointError):
    """The answer is no completion."""

    kind = "endpoint_garbled"


@dataclass(frozen=True, slots=True)
class Completion:
    """The text that an endpoint wrote."""

    text: str  # without the stop string
    finish_reason: Literal["stop", "length"]  # "stop": at a stop string or by itself, as servers don't say which


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int = 0


class _Body(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


_last_status: ContextVar[list[int]] = ContextVar("last_status")
"""HTTP statuses that this task's request got. They are noted here because the retries happen inside `openai`."""


class Endpoint:
    """A client of one endpoint. Make it and use it inside one event loop."""

    def __init__(self, config: EndpointConfig, environ: Mapping[str, str] = os.environ) -> None:
        """Opens no connection yet. Raises ValueError if the variable that should contain the key is not set."""
        import openai  # the import takes a second

        # A key that isn't needed is never sent. By default the client would send OPENAI_API_KEY to any server.
        key = environ.get(config.api_key_env, "") if config.api_key_env else "none"
        if not key:
            raise ValueError(f"endpoint.api_key_env = {config.api_key_env!r}: no such environment variable is set here")
        self._config = config
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=config.base_url,
            max_retries=config.max_retries,
            timeout=config.timeout_s,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [_note_status]}),
        )
        self._places = asyncio.Semaphore(config.concurrency)
        self.num_requests_in_flight = 0
        self.num_generated_tokens = 0
        """As counted by the server; 0 if it doesn't count."""

    async def complete(
        self, messages: Sequence[Message], *, max_tokens: int, temperature: float, stop: Sequence[str] = ()
    ) -> Completion:
        """The assistant's next message. Waits for one of `concurrency` places, then `deadline_s`. Raises `EndpointError`."""
        async with self._places:
            self.num_requests_in_flight += 1
            statuses: list[int] = []
            token = _last_status.set(statuses)
            try:
                async with asyncio.timeout(self._config.deadline_s):
                    return await self._complete(messages, max_tokens, temperature, stop)
            except TimeoutError:
                waited = f"{self._who()} gave no completion within endpoint.deadline_s = {self._config.deadline_s:g} s"
                if statuses and statuses[-1] == 429:
                    raise RateLimited(f"{waited}; it last refused for its rate limit") from None
                raise EndpointTimeout(waited) from None
            finally:
                _last_status.reset(token)
                self.num_requests_in_flight -= 1

    async def _complete(
        self, messages: Sequence[Message], max_tokens: int, temperature: float, stop: Sequence[str]
    ) -> Completion:
        openai, tries = self._openai, f"after {self._config.max_retries} retries"
        optional: dict[str, Any] = {"stop": list(stop)} if stop else {}
        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=self._config.model,
                messages=list(messages),
                max_tokens=max_tokens,
                temperature=temperature,
                **optional,
            )
        except openai.APITimeoutError:
            silent = f"{self._who()} was silent for endpoint.timeout_s = {self._config.timeout_s:g} s"
            raise EndpointTimeout(f"{silent}, {tries}") from None
        except openai.APIConnectionError as error:
            raise EndpointDown(f"{self._who()} can't be reached, {tries}: {error.__cause__ or error}") from None
        except openai.RateLimitError as error:
            raise RateLimited(f"{self._who()} refused for its rate limit, {tries}: {_detail(error)}") from None
        except openai.APIStatusError as error:
            if error.status_code >= 500:
                message = f"{self._who()} answered {error.status_code}, {tries}: {_detail(error)}"
                raise EndpointDown(message) from None
            raise EndpointRefused(f"{self._who()} answered {error.status_code}: {_detail(error)}") from None
        except openai.OpenAIError as error:
            raise EndpointGarbled(f"{self._who()}: {type(error).__name__}: {_detail(error)}") from None
        return self._read(response.text)

    def _read(self, body: str) -> Completion:
        try:
            parsed = _Body.model_validate_json(body)
            choice = parsed.choices[0]
        except (ValidationError, IndexError):
            raise EndpointGarbled(
                f"{self._who()} sent something other than a completion: {body[:MAX_DETAIL_CHARS]!r}"
            ) from None
        self.num_generated_tokens += parsed.usage.completion_tokens if parsed.usage else 0
        if choice.finish_reason == "content_filter":
            raise EndpointRefused(f"{self._who()} filtered its reply out")
        return Completion(choice.message.content, "length" if choice.finish_reason == "length" else "stop")

    async def close(self) -> None:
        await self._client.close()

    def _who(self) -> str:
        return f"the endpoint {self._config.base_url} ({self._config.model})"


async def _note_status(response: Any) -> None:
    if (statuses := _last_status.get(None)) is not None:
        statuses.append(response.status_code)


def _detail(error: Exception) -> str:
    return str(error)[:MAX_DETAIL_CHARS]


class Conversation:
    """One episode's messages. `episode.run` uses its `generate` and `encode`."""

    def __init__(
        self, endpoint: Endpoint, tokenizer: Tokenizer, messages: Sequence[Message], *, temperature: float
    ) -> None:
        self._endpoint = endpoint
        self._tokenizer = tokenizer
        self._messages = list(messages)
        self._temperature = temperature
        self._result: str | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of a tool's result, which goes into the next message. An episode encodes nothing else."""
        self._result = text
        return encode(self._tokenizer, text)

    async def generate(self, token_ids: Sequence[int], max_tokens: int) -> Generation:
        """The next turn. `token_ids` is not used, as the messages have the same content."""
        if self._result is not None:
            self._messages.append({"role": "user", "content": f"{self._result.strip()}\n{CONTINUE}"})
            self._result = None
        completion = await self._endpoint.complete(
            self._messages, max_tokens=max_tokens, temperature=self._temperature, stop=markup.stop_strings()
        )
        text, stopped = as_stopped(markup.quote(completion.text), closed_by_stop=completion.finish_reason == "stop")
        ids = encode(self._tokenizer, text)
        if len(ids) > max_tokens:  # the endpoint's tokens may be longer than the policy's
            ids, text = ids[:max_tokens], self._tokenizer.decode(ids[:max_tokens])
            stopped, completion = False, Completion(text, "length")
        self._messages.append({"role": "assistant", "content": text})
        finish_reason: Literal["stop_string", "eos", "length"] = (
            "length" if completion.finish_reason == "length" else "eos"
        )
        return Generation(
            token_ids=ids,
            logprobs=[0.0] * len(ids),
            text=text,
            finish_reason="stop_string" if stopped else finish_reason,
            segments=(),  # they belong to no policy version
        )


def as_stopped(text: str, *, closed_by_stop: bool) -> tuple[str, bool]:
    """`text` as an engine returns it, up to and including the first stop string, and whether there is one.

    If a server ignores or keeps stop strings, the text is cut after the first. If it drops them (`closed_by_stop`: it did
    not end because of its length), the last tag is open and is closed here. A model that ends by itself within such a tag
    counts as having closed it, since chat endpoints don't report the difference.
    """
    ends = [at + len(stop) for stop in markup.stop_strings() if (at := text.find(stop)) >= 0]
    if ends:
        return text[: min(ends)], True
    blocks = markup.parse(text)
    if closed_by_stop and blocks and not (last := blocks[-1]).closed and f"</{last.tag}>" in markup.stop_strings():
        return f"{text}</{last.tag}>", True
    return text, False


def on_endpoint(
    endpoint: Endpoint,
    tokenizer: Tokenizer,
    call_tool: episode.CallTool,
    config: EpisodeConfig,
    *,
    max_concurrent_attempts: int,
) -> AttemptFn:
    """Attempts by `endpoint`, in the tokens of the policy's `tokenizer`. The server samples, so seeds have no effect."""
    places = asyncio.Semaphore(max_concurrent_attempts)

    async def attempt(task: Task, prompt: str, seed: int, temperature: float) -> Trajectory:
        messages = prompt_messages(prompt, config.system_prompt)
        conversation = Conversation(endpoint, tokenizer, messages, temperature=temperature)
        async with places:  # the deadline of an episode starts when it has its place
            return await episode.run(
                task,
                [],
                0,
                generate=conversation.generate,
                call_tool=call_tool,
                encode=conversation.encode,
                config=config,
            )

    return attempt
