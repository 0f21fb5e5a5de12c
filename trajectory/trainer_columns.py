"""What other trainers read of our records, so that they learn from the tokens that were sampled, and from no tool's result.

A chat template renders a reply as it likes: Qwen3's keeps what stands behind the last `</think>` and drops the tool calls
before it. So the records hold what needs no template: token ids with labels for TRL and `transformers`, and for
LLaMA-Factory the rendered text in turns (its template `empty` puts turns together as they are).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trajectory.chat import Tokenizer, render_text
from trajectory.records import encode_conversation, preference_sides, reply_behind_prompt, split_response

NO_LOSS = -100
"""The label of a token that isn't learned, as PyTorch's cross entropy ignores it."""


def sft_columns(record: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """`record` of `sft.jsonl` with three columns more.

    `input_ids` and `labels`: prompt, response and end token, in the ids of `tokenizer`; labels only on what the model wrote.
    `turns`: the same as text, `user` the rendered prompt, `tool` what the environment wrote, `assistant` what the model did.
    """
    messages = record["messages"]
    encoded = encode_conversation(tokenizer, messages, eos_id=getattr(tokenizer, "eos_token_id", None))
    response = np.where(encoded.mask, encoded.response_ids, NO_LOSS)
    turns = [{"role": "user", "content": render_text(tokenizer, messages[:-1])}]
    turns += [
        {"role": "assistant" if by_model else "tool", "content": text}
        for text, by_model in split_response(reply_behind_prompt(tokenizer, messages))
    ]
    turns[-1]["content"] += getattr(tokenizer, "eos_token", None) or ""
    return {
        **record,
        "input_ids": [*encoded.prompt_ids.tolist(), *encoded.response_ids.tolist()],
        "labels": [NO_LOSS] * len(encoded.prompt_ids) + response.tolist(),
        "turns": turns,
    }


def preference_columns(record: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """`record` of `preferences.jsonl` with `prompt`, the rendered text, and both sides as they follow it."""
    chosen, rejected = preference_sides(record)
    return {
        **record,
        "prompt": render_text(tokenizer, chosen[:-1]),
        "chosen": reply_behind_prompt(tokenizer, chosen),
        "rejected": reply_behind_prompt(tokenizer, rejected),
    }


def dataset_info() -> dict[str, Any]:
    """LLaMA-Factory's `dataset_info.json` for both files; they are trained on with `template: empty`."""
    return {
        "autotraj_sft": {
            "file_name": "sft.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "observation_tag": "tool",
                "function_tag": "function",
                "system_tag": "system",
            },
        },
        "autotraj_preferences": {
            "file_name": "preferences.jsonl",
            "formatting": "alpaca",
            "ranking": True,
            "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        },
    }
