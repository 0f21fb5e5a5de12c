"""Converts trajectories to records of files, and records back to tokens.

    sft.jsonl           {"messages": [system?, user, assistant], "task_id", …}
    preferences.jsonl   {"messages": [system?, user], "chosen": reply, "rejected": reply, "task_id", …}

Both also have the columns that other trainers read (`trainer_columns`). A response is one assistant message that includes
its tool results. It is tokenised piece by piece, as in an episode, so that the environment's tokens are known and carry
no loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.whole import replacing
from trajectory import markup
from trajectory.chat import Tokenizer, encode, prompt_messages, prompt_opening, render_messages, without_opening
from trajectory.tools import TOOLS

Message = dict[str, str]

_END_OF_RESULT = "</result>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A prompt and one response to it, T response tokens."""

    prompt_ids: NDArray[np.int32]  # (P,)
    response_ids: NDArray[np.int32]  # (T,)
    mask: NDArray[np.bool_]  # (T,) True on the model's own tokens


def sft_record(question: str, response: str, system_prompt: str, **extra: Any) -> dict[str, Any]:
    """One line of `sft.jsonl`, with the fields of `extra` (task id, scores, origin) added."""
    return {"messages": [*prompt_messages(question, system_prompt), _assistant(response)], **extra}


def preference_record(question: str, chosen: str, rejected: str, system_prompt: str, **extra: Any) -> dict[str, Any]:
    """One line of `preferences.jsonl`. Raises ValueError if both sides are the same, as then neither is preferred."""
    if chosen.split() == rejected.split():
        raise ValueError(f"chosen and rejected are the same text: {chosen[:80]!r}")
    return {"messages": prompt_messages(question, system_prompt), "chosen": chosen, "rejected": rejected, **extra}


def preference_sides(record: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """The conversations that end with the chosen and the rejected reply, from a line of `preferences.jsonl` or from a record
    in TRL's chat form, which has lists of messages as `prompt`, `chosen` and `rejected`.

    Raises ValueError, with the reason, for anything else, and for a chosen reply whose tool results can't be identified. A
    rejected reply may be as malformed as it was sampled.
    """
    prompt = record.get("messages", record.get("prompt"))
    sides = [
        [_assistant(record[side])] if isinstance(record[side], str) else record[side] for side in ("chosen", "rejected")
    ]
    if not isinstance(prompt, list) or not all(isinstance(side, list) and len(side) == 1 for side in sides):
        raise ValueError("the prompt is not a list of messages, or a side is neither a text nor a list of one message")
    chosen, rejected = ([*prompt, *side] for side in sides)
    check_conversation(chosen)
    check_messages(rejected)
    return chosen, rejected


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], *, eos_id: int | None = None) -> Encoded:
    """Tokens of a conversation that ends with the assistant's message. `eos_id`, if given, ends it and carries loss.

    If the template's prompt ends with `<think>`, it is not repeated in the response.
    """
    *prompt, reply = messages
    if reply["role"] != "assistant":
        raise ValueError(f"the last message is the {reply['role']}'s, not the assistant's")
    ids: list[int] = []
    mask: list[bool] = []
    for text, by_model in split_response(reply_behind_prompt(tokenizer, messages)):
        piece = encode(tokenizer, text)
        ids += piece
        mask += [by_model] * len(piece)
    if eos_id is not None:
        ids.append(eos_id)
        mask.append(True)
    return Encoded(
        prompt_ids=np.array(render_messages(tokenizer, prompt), np.int32),
        response_ids=np.array(ids, np.int32),
        mask=np.array(mask, np.bool_),
    )


def reply_behind_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The last message as it follows the prompt that the template renders from the other messages."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return without_opening(messages[-1]["content"], prompt_opening(tokenizer, system))


def split_response(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a response, each with whether the model wrote it. Joined, they are `text`.

    The environment wrote each `<result>` that directly follows a tool call, on the same line or on lines of its own, with
    the white space before it and one line end after it. Its output is escaped, so the first `</result>` ends it.
    """
    end = 0
    call_with_result = _call_with_result(tuple(TOOLS))
    while (opened := call_with_result.search(text, end)) is not None:
        closed = text.find(_END_OF_RESULT, opened.end())
        if closed < 0:
            break
        start, stop = opened.start(1), closed + len(_END_OF_RESULT)
        stop += text.startswith("\n", stop)
        yield text[end:start], True
        yield text[start:stop], False
        end = stop
    if end < len(text):
        yield text[end:], True


@cache
def _call_with_result(tools: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the end of a call of one of these tools and the beginning of its result."""
    return re.compile(rf"</(?:{'|'.join(tools)})>(\s*<result>)")


def check_results(text: str) -> None:
    """Raises ValueError for a response whose tool results can't be identified, as the model would be trained on them."""
    shape = ""
    for piece, by_model in split_response(text):
        inside = piece if by_model else piece.strip().removeprefix("<result>").removesuffix(_END_OF_RESULT)
        if markup.contains_forged_result(inside):
            raise ValueError(
                f"a <result> that is not closed, is inside another, or does not follow a tool call: {inside[:80]!r}"
            )
        shape += piece if by_model else "<result></result>"
    if "tool_without_result" in markup.validate(shape):
        raise ValueError("a tool call that its <result>…</result> does not directly follow")


def check_sft(record: Mapping[str, Any]) -> None:
    """Raises ValueError, with the reason, for anything but a line of `sft.jsonl`."""
    check_conversation(record["messages"])


def check_preference(record: Mapping[str, Any]) -> None:
    """Raises ValueError, with the reason, for anything but a line of `preferences.jsonl`."""
    preference_sides(record)


def check_conversation(messages: Any) -> None:
    """Raises ValueError, with the reason, for anything but a conversation whose reply can be learned."""
    check_messages(messages)
    if not messages[-1]["content"].strip():
        raise ValueError("the reply is empty")
    check_results(messages[-1]["content"])


def check_messages(messages: Any) -> None:
    """Raises ValueError, with the reason, for anything but a conversation that ends with one reply, tool results
    included."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("the messages are not a list of objects with role and content")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message that is not an object with role and content, both text: {str(message)[:80]}")
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(
                f"a message of the role {message.get('role')!r}; tool results stand in the assistant's message, as "
                "<code>…</code><result>…</result>"
            )
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s, not the assistant's reply")


def read_jsonl(
    path: str | Path, fields: Sequence[str], check: Callable[[Mapping[str, Any]], None] = lambda record: None
) -> list[dict[str, Any]]:
    """The records of a file. Raises ValueError, with the line, for anything but an object with all `fields`, and when
    `check` raises ValueError."""
    records = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8; too deep
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            missing = [f for f in fields if not isinstance(record, dict) or f not in record]
            if missing:
                raise ValueError(f"{path}, line {number}: no field {missing[0]!r}")
            try:
                check(record)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            records.append(record)
    return records


def distinct(records: Iterable[dict[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """The records without repetition: the first of all that have the same `fields`, in their order."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        found.setdefault(json.dumps([record[field] for field in fields]), record)
    return list(found.values())


def write_jsonl(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write all records. If that is interrupted, the file stays as it was."""
    with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=True) + "\n" for record in records)


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
