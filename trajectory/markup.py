"""The trajectory grammar: think, call a tool, read its result, think again, answer.

    <think>…</think> <code>…</code> <result>…</result> <think>…</think> <answer>… \\boxed{…} …</answer>

The model writes every tag except `<result>`, which the environment writes. `<code>` stands for any tool's tag (`TOOLS`). The
grammar is flat: no tag may be inside another block. All functions take time linear in the text, which may be hostile.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

from trajectory.tools import TOOLS
from trajectory.types import ToolCall

Rule = Literal[
    "unpaired_tag",
    "nested_tag",
    "no_think",
    "no_answer",
    "tool_without_result",
    "result_without_tool",
    "no_boxed_answer",
]
"""The rule that a malformed trajectory broke: a tag without its partner; a block that opens inside another; no closed
`<think>`; no closed `<answer>`; a tool's block that isn't followed by its own closed `<result>`; a `<result>` that
follows no tool call; no non-empty `\\boxed{}` in the last `<answer>`."""

# `<x>` without spaces: our tags, and the control tokens that a tokenizer would read as one token (`<|im_end|>`, `</s>`). The
# pattern never reads past the next "<", so it stays linear.
_TAG_LIKE = re.compile(r"<(?=[^<>\s]+>)")
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def stop_strings() -> tuple[str, ...]:
    """The strings at which generation stops, because the environment must run a tool or the episode has ended."""
    return (*(f"</{tag}>" for tag in TOOLS), "</answer>")


@cache
def _tag(tools: tuple[str, ...]) -> re.Pattern[str]:
    """Matches a tag of the grammar with these tools."""
    return re.compile(rf"<(/?)(think|{'|'.join(tools)}|result|answer)>")


@cache
def _foreign_tag_like(tools: tuple[str, ...]) -> re.Pattern[str]:
    """Like `_TAG_LIKE`, but without the tags of the grammar with these tools."""
    return re.compile(rf"<(?!/?(?:think|{'|'.join(tools)}|result|answer)>)(?=[^<>\s]+>)")


@dataclass(frozen=True, slots=True)
class Block:
    """The text of one tag. An unclosed block extends to the next tag of the grammar, or to the end."""

    tag: str  # think, result, answer or a tool's
    content: str
    start: int  # of the opening tag, in characters
    end: int  # after the closing tag
    closed: bool


def parse(text: str) -> list[Block]:
    """The blocks of `text` in order. Text between blocks, and closing tags without an opening tag, are skipped."""
    blocks: list[Block] = []
    opened: re.Match[str] | None = None
    for match in _tag(tuple(TOOLS)).finditer(text):
        if opened is not None:
            closes = match[1] == "/" and match[2] == opened[2]
            blocks.append(_block(text, opened, match.start(), match.end() if closes else match.start(), closes))
        opened = None if match[1] else match
    if opened is not None:
        blocks.append(_block(text, opened, len(text), len(text), closed=False))
    return blocks


def _block(text: str, opened: re.Match[str], content_end: int, end: int, closed: bool) -> Block:
    return Block(opened[2], text[opened.end() : content_end], opened.start(), end, closed)


def validate(text: str) -> tuple[Rule, ...]:
    """The rules that `text` breaks, each once, in the order of `Rule`. Empty if it is well-formed."""
    blocks = parse(text)
    closed = {block.tag for block in blocks if block.closed}
    neighbours = list(pairwise([None, *blocks, None]))
    unpaired, nested = _pairing(text)
    broken: dict[Rule, bool] = {
        "unpaired_tag": unpaired,
        "nested_tag": nested,
        "no_think": "think" not in closed,
        "no_answer": "answer" not in closed,
        "tool_without_result": any(
            left is not None
            and left.tag in TOOLS
            and not (right is not None and right.tag == "result" and right.closed)
            for left, right in neighbours
        ),
        "result_without_tool": any(
            right is not None and right.tag == "result" and (left is None or left.tag not in TOOLS)
            for left, right in neighbours
        ),
        "no_boxed_answer": "answer" in closed and final_answer(text) is None,
    }
    return tuple(rule for rule, is_broken in broken.items() if is_broken)


def _pairing(text: str) -> tuple[bool, bool]:
    """Whether a tag lacks its partner, and whether a block opens inside another."""
    depth: Counter[str] = Counter()
    total = 0
    unpaired = nested = False
    for match in _tag(tuple(TOOLS)).finditer(text):
        tag = match[2]
        if not match[1]:
            nested |= total > 0
            depth[tag] += 1
            total += 1
        elif depth[tag]:
            depth[tag] -= 1
            total -= 1
        else:
            unpaired = True
    return unpaired or total > 0, nested


def trailing_tool_call(text: str) -> ToolCall | None:
    """The tool call whose closing tag ends `text`, if there is one. The environment must run it next."""
    if not text.endswith(stop_strings()):
        return None
    blocks = parse(text)
    if not blocks or not (last := blocks[-1]).closed or last.end != len(text) or last.tag not in TOOLS:
        return None
    return ToolCall(tool=TOOLS[last.tag].name, content=last.content.strip("\n"))


def contains_forged_result(text: str) -> bool:
    """Whether text of the model contains `<result>` or `</result>`, which only the environment may write."""
    return "<result>" in text or "</result>" in text


def final_answer(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{}` of the last closed `<answer>`, stripped; None if there is none."""
    answers = [block.content for block in parse(text) if block.tag == "answer" and block.closed]
    return last_boxed(answers[-1]) if answers else None


def last_boxed(text: str) -> str | None:
    r"""The content of the balanced `\boxed{…}` that starts last, stripped; None if there is none or it is empty.

    `\{` and `\}` are characters and don't count as braces.
    """
    open_braces: list[tuple[int, bool]] = []  # (where the content starts, is it a \boxed)
    start, end = -1, -1
    for match in _BRACE.finditer(text):
        if match[0].startswith("\\boxed") or match[0] == "{":
            open_braces.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and open_braces:
            content_start, boxed = open_braces.pop()
            if boxed and content_start > start:
                start, end = content_start, match.start()
    return (text[start:end].strip() or None) if start >= 0 else None


def escape(text: str) -> str:
    """`text` with a space after each `<` that begins something like a tag, so that no tag or control token remains.

    `</result>` becomes `< /result>`, which is ASCII and readable to a model, and mostly has other tokens. `x<y` and
    `<class 'int'>` stay as they are. Lone surrogates, which no tokenizer can encode, become `?`.
    """
    return _TAG_LIKE.sub("< ", text.encode("utf-8", "replace").decode("utf-8"))


def quote(text: str) -> str:
    """A trajectory for display in a prompt: escaped as by `escape`, except for the tags of the grammar.

    A control token (`<|im_end|>`, `</s>`) in it would end the message that quotes it.
    """
    return _foreign_tag_like(tuple(TOOLS)).sub("< ", text.encode("utf-8", "replace").decode("utf-8"))


def render_result(output: str, max_chars: int) -> str:
    """A tool's output as the environment appends it: exactly one closed `<result>`, whatever `output` contains.

    If the escaped output is longer than `max_chars` characters, its beginning and end are kept, with a note between them.
    """
    body = escape(output).strip("\n")
    return f"\n<result>\n{shortened(body, max_chars)}\n</result>\n"


def shortened(text: str, max_chars: int, note: str | None = None) -> str:
    """The beginning and end of a text longer than `max_chars` characters, with a note between them on what is left out.

    The note stands on a line of its own, so that no tag can form across the cut.
    """
    if len(text) <= max_chars:
        return text
    head, tail = text[: (max_chars + 1) // 2], text[len(text) - max_chars // 2 :]
    return f"{head}\n{note or f'[... {len(text) - max_chars} characters left out ...]'}\n{tail}"
