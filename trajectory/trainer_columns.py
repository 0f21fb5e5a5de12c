"""The columns of our records for other trainers, which then learn from the sampled tokens and from no tool's result.

Chat templates change replies. Qwen3's template keeps the text after the last `</think>` and drops the tool calls before it.
So the records have columns that need no template: token ids with labels for TRL and `transformers`, and the rendered text in
turns for LLaMA-Factory (whose template `empty` joins turns without changes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trajectory.chat import Tokenizer, render_text
from trajectory.records import encode_conversation, preference_sides, reply_behind_prompt, split_response

NO_LOSS = -100
"""The label of a token that isn't learned; PyTorch's cross entropy ignores it."""


def sft_columns(record: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """`record` of `sft.jsonl` with three more columns.

    `input_ids` and `labels`: prompt, response and end token, as ids of `tokenizer`; only tokens of the model have labels.
    `turns`: the same as text. `user` is the rendered prompt, `tool` the environment's text, `assistant` the model's text.
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
    """`record` of `preferences.jsonl` with `prompt`, the rendered text, and both sides as they follow the prompt."""
    chosen, rejected = preference_sides(record)
    return {
        **record,
        "prompt": render_text(tokenizer, chosen[:-1]),
        "chosen": reply_behind_prompt(tokenizer, chosen),
        "rejected": reply_behind_prompt(tokenizer, rejected),
    }


def dataset_info() -> dict[str, Any]:
    """LLaMA-Factory's `dataset_info.json` for both files, which need `template: empty` in training."""
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
