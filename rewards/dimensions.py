"""The dimensions of a trajectory's quality: one function each (arXiv 2601.23032, stage 1).

Words are separated by white space, in the whole response including tool results. Everything takes time linear in the
text, which may be hostile. To add a dimension, write a function of `QualityInput` and add a line to `DIMENSIONS`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from trajectory import markup
from trajectory.types import Task, Trajectory

DOUBTS = ("maybe", "unsure", "guess", "seems", "perhaps", "probably", "might", "likely", "recheck")
"""Words that show a lack of confidence."""

_DOUBT = re.compile(rf"\b(?:{'|'.join(DOUBTS)})\b")
_THINK = re.compile(r"<(/?)think>", re.IGNORECASE)
_MIN_WORDS = 6  # a shorter text can't have relevant repetition
_COMMAND = re.compile(r"\\[a-zA-Z]+")
# Numbers with their separators, and words.
_PART = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class QualityInput:
    """The data that a dimension may use."""

    words: list[str]  # of the trajectory's text
    ideal_num_words: int
    trajectory: Trajectory
    task: Task


# --- the paper's dimensions -------------------------------------------------------------------------------------------


def confidence(text: str) -> float:
    """0 if a closed `<think>` contains one of `DOUBTS` as a whole word, in upper or lower case; else 1."""
    lowered = text.lower()
    if not any(word in lowered for word in DOUBTS):  # true of nearly all texts, and nine plain searches are fast
        return 1.0
    opened = -1
    for tag in _THINK.finditer(text):
        if tag[1] and opened >= 0:
            if _DOUBT.search(text[opened : tag.start()].lower()):
                return 0.0
            opened = -1
        elif not tag[1] and opened < 0:
            opened = tag.end()
    return 1.0


def length(num_words: int, ideal_num_words: int) -> float:
    """exp(−(n − ideal)² / (2·(ideal/2)²)); 1 if there is no ideal (≤ 0)."""
    if ideal_num_words <= 0:
        return 1.0
    return math.exp(-(((num_words - ideal_num_words) / (ideal_num_words / 2)) ** 2) / 2)


def repetition(words: list[str]) -> float:
    """1 − (occurrences of word trigrams that occur more than once) / (all trigrams); 1 for less than 6 words."""
    if len(words) < _MIN_WORDS:
        return 1.0
    num_trigrams = len(words) - 2
    if len(set(zip(words, words[1:], words[2:], strict=False))) == num_trigrams:
        return 1.0
    counts = Counter(zip(words, words[1:], words[2:], strict=False))
    return 1 - sum(count for count in counts.values() if count > 1) / num_trigrams


# --- dimensions that need more than the text ------------------------------------------------------------------------------


def tool_success(trajectory: Trajectory) -> float:
    """1 − failed tool calls / tool calls; 1 without calls. A call without a result counts as failed."""
    results = [turn.tool_result for turn in trajectory.turns if turn.tool_call is not None]
    failed = sum(result is None or result.status != "ok" for result in results)
    return 1 - failed / len(results) if results else 1.0


def grounding(trajectory: Trajectory, task: Task) -> float:
    """Share of the final answer's parts (numbers and words) that also occur in a tool result or in the question.

    1,234 and 1234 are the same number, and so are 5 and 5.0. It is 0 without an answer, or if the answer has neither numbers
    nor words.
    """
    answer = markup.final_answer(trajectory.text)
    parts = _parts(_COMMAND.sub(" ", answer)) if answer else set()
    if not parts:
        return 0.0
    outputs = [turn.tool_result.output for turn in trajectory.turns if turn.tool_result is not None]
    known = set().union(*map(_parts, (task.question, *outputs)))
    return len(parts & known) / len(parts)


def _parts(text: str) -> set[str]:
    return {_plain(part) if part[0].isdigit() else part for part in _PART.findall(text.lower())}


def _plain(number: str) -> str:
    number = number.replace(",", "")
    return (number.rstrip("0").rstrip(".") if number.count(".") == 1 else number) or "0"


DIMENSIONS: dict[str, Callable[[QualityInput], float]] = {
    "confidence": lambda e: confidence(e.trajectory.text),
    "length": lambda e: length(len(e.words), e.ideal_num_words),
    "repetition": lambda e: repetition(e.words),
    "tool_success": lambda e: tool_success(e.trajectory),
    "grounding": lambda e: grounding(e.trajectory, e.task),
}
"""Every dimension by its name in `QualityConfig.weights`."""
