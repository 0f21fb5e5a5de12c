"""Trajectories as chat-format records, as TRL and LLaMA-Factory read them, and back to tokens.

    sft.jsonl           {"messages": [system?, user, assistant], "task_id", …}
    preferences.jsonl   {"prompt": [system?, user], "chosen": [assistant], "rejected": [assistant], "task_id", …}

A response is one assistant message with its tool results inside. Its tokens are made piece by piece, as an episode makes
them, so that what the environment wrote is known and carries no loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trajectory.chat import Tokenizer, encode, render_messages

Message = dict[str, str]

# What `markup.render_result` writes. The output inside is escaped, so the first `</result>` is the environment's own.
_RESULT = re.compile(r"\n<result>\n.*?\n</result>\n", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A prompt and one response to it, T response tokens."""

    prompt_ids: NDArray[np.int32]  # (P,)
    response_ids: NDArray[np.int32]  # (T,)
    mask: NDArray[np.bool_]  # (T,) True on the model's own tokens


def prompt_messages(question: str, system_prompt: str) -> list[Message]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def sft_record(question: str, response: str, system_prompt: str, **extra: Any) -> dict[str, Any]:
    """One line of `sft.jsonl`; `extra` (task id, scores, where it came from) rides along."""
    return {"messages": [*prompt_messages(question, system_prompt), _assistant(response)], **extra}


def preference_record(question: str, chosen: str, rejected: str, system_prompt: str, **extra: Any) -> dict[str, Any]:
    """One line of `preferences.jsonl`. Raises ValueError if both sides are the same: there is nothing to prefer.

    TRL reads `chosen` and `rejected` as lists of messages, LLaMA-Factory the `_message` fields (see `dataset_info`).
    """
    if chosen.split() == rejected.split():
        raise ValueError(f"chosen and rejected are the same text: {chosen[:80]!r}")
    return {
        "prompt": prompt_messages(question, system_prompt),
        "chosen": [_assistant(chosen)],
        "rejected": [_assistant(rejected)],
        "chosen_message": _assistant(chosen),
        "rejected_message": _assistant(rejected),
        **extra,
    }


def dataset_info() -> dict[str, Any]:
    """LLaMA-Factory's `dataset_info.json` for both files."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    sharegpt = {"formatting": "sharegpt", "tags": tags | {"system_tag": "system"}}
    return {
        "autotraj_sft": {"file_name": "sft.jsonl", "columns": {"messages": "messages"}} | sharegpt,
        "autotraj_preferences": {
            "file_name": "preferences.jsonl",
            "ranking": True,
            "columns": {"messages": "prompt", "chosen": "chosen_message", "rejected": "rejected_message"},
        }
        | sharegpt,
    }


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], *, eos_id: int | None = None) -> Encoded:
    """Tokens of a conversation that ends with the assistant's message; `eos_id`, if given, ends it and carries loss."""
    *prompt, reply = messages
    if reply["role"] != "assistant":
        raise ValueError(f"the last message is the {reply['role']}'s, not the assistant's")
    ids: list[int] = []
    mask: list[bool] = []
    for text, by_model in split_response(reply["content"]):
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


def split_response(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a response, each with whether the model wrote it; joined they are `text`."""
    end = 0
    for match in _RESULT.finditer(text):
        if match.start() > end:
            yield text[end : match.start()], True
        yield match[0], False
        end = match.end()
    if end < len(text):
        yield text[end:], True


def read_jsonl(path: str | Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a file. Raises ValueError, with the line, for what isn't an object with all `fields`."""
    records = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            missing = [f for f in fields if not isinstance(record, dict) or f not in record]
            if missing:
                raise ValueError(f"{path}, line {number}: no field {missing[0]!r}; `synthesize` writes it")
            records.append(record)
    return records


def write_jsonl(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes all records, or, if that is interrupted, leaves the file as it was."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=True) + "\n" for record in records)
    partial.replace(target)


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
