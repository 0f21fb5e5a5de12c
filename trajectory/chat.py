"""Makes a prompt's token ids from a question, through the model's own chat template.

A trajectory is one assistant message that contains its tool results. So a template is rendered only once, for the prompt,
and everything after it is appended as tokens. A template may begin the reply itself: if its prompt ends with `<think>\n`,
the model continues within that thought, and the text of the reply still begins with the tag (`prompt_opening`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from storage.objects import fetch
from trajectory import markup
from trajectory.tools import TOOLS

_PROBE_QUESTION = "What is 2 + 3?"
# Two thoughts, a tool call and its result. They show whether a template rewrites earlier reasoning or trims text.
_PROBE_REPLY = (
    "<think>\nAdd them.\n</think>\n<code>\nprint(2 + 3)\n</code>\n<result>\n5\n</result>\n"
    "<think>It is 5.</think>\n<answer>\n\\boxed{5}\n</answer>"
)


class Tokenizer(Protocol):
    """The methods of a Hugging Face tokenizer that are used here."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


def default_system_prompt() -> str:
    """The grammar as it is explained to a model: the use of each tag, and an example of each tool that has one."""
    closing = [f"</{tag}>" for tag in TOOLS]
    after_each = " or ".join([", ".join(closing[:-1]), closing[-1]] if closing[1:] else closing)
    return "\n".join(
        (
            "Solve the question step by step. You can run tools while you reason. Use these tags, never nested:",
            "- <think>your reasoning</think> before each tool call and before the answer.",
            *(f"- {tool.usage}" for tool in TOOLS.values()),
            f"- <result>what the tool returned</result>: written by the environment after each {after_each}, never by you.",
            r"- <answer>a short conclusion with the final answer in \boxed{}</answer> once, at the end.",
            "Use at most three tool calls.",
            *(f"Example:\n{tool.example}" for tool in TOOLS.values() if tool.example),
        )
    )


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of the model at `path` (a folder or a URI)."""
    from transformers import AutoTokenizer  # the import takes seconds

    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(fetch(path))
    return tokenizer


def prompt_messages(question: str, system_prompt: str) -> list[dict[str, str]]:
    """The conversation that a question begins; an empty `system_prompt` sends no system message."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def render_prompt(tokenizer: Tokenizer, question: str, system_prompt: str) -> list[int]:
    """Token ids of the prompt (P,), including the generation prompt. An empty `system_prompt` sends no system message.

    Raises ValueError if the tokenizer has no chat template or its template refuses these messages.
    """
    return render_messages(tokenizer, prompt_messages(question, system_prompt))


def render_messages(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation that the assistant continues (P,). Raises as `render_prompt` does."""
    return encode(tokenizer, render_text(tokenizer, messages))


def render_text(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> str:
    """A conversation that the assistant continues, as text. Raises as `render_prompt` does."""
    return _render(tokenizer, list(messages), add_generation_prompt=True)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text` itself, without a token for the beginning or end of the sequence."""
    return tokenizer.encode(text, add_special_tokens=False)


def prompt_opening(tokenizer: Tokenizer, system_prompt: str) -> str:
    """The part of the reply that the template's prompt already has: `<think>` and what follows it, or nothing.

    Raises ValueError for a template that opens another tag of the grammar, and as `render_prompt` does.
    """
    prompt = _render(tokenizer, prompt_messages(_PROBE_QUESTION, system_prompt), add_generation_prompt=True)
    tail = prompt.rpartition(_PROBE_QUESTION)[2]
    blocks = markup.parse(tail)
    if not blocks or (last := blocks[-1]).closed or last.end != len(tail):
        return ""
    if last.tag != "think":
        raise ValueError(f"the chat template begins the reply with <{last.tag}>; a reply can begin only with <think>")
    return tail[last.start :]


def without_opening(reply: str, opening: str) -> str:
    """`reply` after a prompt that ends with `opening`: without the `<think>` that is already in the prompt."""
    if not opening or reply.startswith(opening):
        return reply[len(opening) :]
    return reply.lstrip().removeprefix("<think>").lstrip("\n") if reply.lstrip().startswith("<think>") else reply


def check_template(tokenizer: Tokenizer, system_prompt: str) -> None:
    """Raises ValueError, with the remedy, for a chat template with which no episode can begin correctly."""
    prompt = _render(tokenizer, prompt_messages(_PROBE_QUESTION, system_prompt), add_generation_prompt=True)
    shown = " ".join(prompt.split())
    if " ".join(_PROBE_QUESTION.split()) not in shown:
        raise ValueError("the chat template leaves out the user's message; set another tokenizer.chat_template")
    if " ".join(system_prompt.split()) not in shown:
        raise ValueError(
            "the chat template leaves out the system message, which explains the tags; set another "
            'tokenizer.chat_template, or episode.system_prompt = "" and explain the tags in the questions'
        )
    prompt_opening(tokenizer, system_prompt)


def check_append_only(tokenizer: Tokenizer, system_prompt: str) -> None:
    """Check that a prompt and a reply don't change when the template renders both, neither as text nor as token ids.

    Raises ValueError, with the first difference. Episodes and our own training never render a reply, so they don't need
    this. But a trainer that renders `messages` by such a template learns from tokens that were not sampled.
    """
    messages = prompt_messages(_PROBE_QUESTION, system_prompt)
    prompt = _render(tokenizer, messages, add_generation_prompt=True)
    reply = {"role": "assistant", "content": _PROBE_REPLY}
    full = _render(tokenizer, [*messages, reply], add_generation_prompt=False)
    expected = prompt + without_opening(_PROBE_REPLY, prompt_opening(tokenizer, system_prompt))
    if not full.startswith(expected):
        at = next((i for i, (a, b) in enumerate(zip(expected, full, strict=False)) if a != b), len(full))
        where = "the prompt" if at < len(prompt) else "the reply"
        raise ValueError(
            f"the chat template is not append-only: it changes {where} at character {at}, "
            f"where the episode has {expected[at : at + 40]!r} and the template renders {full[at : at + 40]!r}"
        )
    prompt_ids, full_ids = encode(tokenizer, prompt), encode(tokenizer, full)
    if full_ids[: len(prompt_ids)] != prompt_ids:
        at = next(i for i, (a, b) in enumerate(zip(prompt_ids, full_ids, strict=False)) if a != b)
        raise ValueError(
            f"the tokenizer is not append-only: with a reply behind it, token {at} of {len(prompt_ids)} of the prompt "
            f"changes from {prompt_ids[at]} ({tokenizer.decode([prompt_ids[at]])!r}) to {full_ids[at]} "
            f"({tokenizer.decode([full_ids[at]])!r})"
        )


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # templates are code and may raise anything, including jinja2's own errors
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the tokenizer's chat template can't render messages of the roles {roles}: {error}; "
            'use an instruct model, set tokenizer.chat_template, or set system_prompt = "" if it has no system role'
        ) from error
    return text
