"""From a question to the prompt's token ids, through the model's own chat template.

A trajectory is one assistant message: tool results stand inside it, so a template is rendered once, for the prompt, and
everything after it is appended as tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trajectory.storage import fetch

SYSTEM_PROMPT = r"""Solve the question step by step. You can run tools while you reason. Use these tags, never nested:
- <think>your reasoning</think> before each tool call and before the answer.
- <code>Python code</code> to run Python (numpy, scipy and sympy are installed). Print what you need to see.
- <search>a query</search> to look something up.
- After each </code> or </search> the environment writes <result>what the tool returned</result>. Never write <result> yourself.
- <answer>a short conclusion with the final answer in \boxed{}</answer> once, at the end.
Use at most three tool calls.
Example: <think>I need 17 times 23.</think><code>print(17 * 23)</code><result>391</result><think>So it is 391.</think><answer>The product is \boxed{391}.</answer>"""  # noqa: E501

_PROBE_QUESTION = "What is 2 + 3?"
# Two thoughts, a tool call and its result: templates that rewrite earlier reasoning or trim text show it here.
_PROBE_REPLY = (
    "<think>\nAdd them.\n</think>\n<code>\nprint(2 + 3)\n</code>\n<result>\n5\n</result>\n"
    "<think>It is 5.</think>\n<answer>\n\\boxed{5}\n</answer>"
)


class Tokenizer(Protocol):
    """What we need of a Hugging Face tokenizer."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of the model at `path` (a folder, a URI or a hub name)."""
    from transformers import AutoTokenizer  # seconds to import

    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(fetch(path))
    return tokenizer


def render_prompt(tokenizer: Tokenizer, question: str, system_prompt: str = SYSTEM_PROMPT) -> list[int]:
    """Token ids of the prompt (P,), generation prompt included. An empty `system_prompt` sends no system message.

    Raises ValueError if the tokenizer has no chat template or its template refuses these messages.
    """
    return render_messages(tokenizer, _messages(question, system_prompt))


def render_messages(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation that the assistant is to continue (P,); raises as `render_prompt` does."""
    return encode(tokenizer, _render(tokenizer, list(messages), add_generation_prompt=True))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text` as it stands: no beginning- or end-of-sequence token is added."""
    return tokenizer.encode(text, add_special_tokens=False)


def check_append_only(tokenizer: Tokenizer, system_prompt: str = SYSTEM_PROMPT) -> None:
    """Make sure that a prompt stays as it was rendered once a reply follows it, as text and as token ids.

    Raises ValueError, with the first difference, for a template that rewrites what came before: tokens appended to the
    prompt during an episode would then not be the tokens of the conversation.
    """
    messages = _messages(_PROBE_QUESTION, system_prompt)
    prompt = _render(tokenizer, messages, add_generation_prompt=True)
    reply = {"role": "assistant", "content": _PROBE_REPLY}
    full = _render(tokenizer, [*messages, reply], add_generation_prompt=False)
    expected = prompt + _PROBE_REPLY
    if not full.startswith(expected):
        at = next((i for i, (a, b) in enumerate(zip(expected, full, strict=False)) if a != b), len(full))
        where = "the prompt" if at < len(prompt) else "the reply"
        raise ValueError(
            f"the chat template is not append-only: it changes {where} at character {at}, "
            f"where the episode has {expected[at : at + 40]!r} and the template renders {full[at : at + 40]!r}; "
            "set a chat_template that leaves the assistant's content as it is (a template without reasoning parsing)"
        )
    prompt_ids, full_ids = encode(tokenizer, prompt), encode(tokenizer, full)
    if full_ids[: len(prompt_ids)] != prompt_ids:
        at = next(i for i, (a, b) in enumerate(zip(prompt_ids, full_ids, strict=False)) if a != b)
        raise ValueError(
            f"the tokenizer is not append-only: with a reply behind it, token {at} of {len(prompt_ids)} of the prompt "
            f"changes from {prompt_ids[at]} ({tokenizer.decode([prompt_ids[at]])!r}) to {full_ids[at]} "
            f"({tokenizer.decode([full_ids[at]])!r}); "
            "end the template's generation prompt with a special token or a newline"
        )


def _messages(question: str, system_prompt: str) -> list[dict[str, str]]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # templates are code: they raise what they like, jinja2's own errors among it
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the tokenizer's chat template can't render messages of the roles {roles}: {error}; "
            'use an instruct model, set tokenizer.chat_template, or set system_prompt = "" if it has no system role'
        ) from error
    return text
