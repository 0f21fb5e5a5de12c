"""Is the final answer right? Mathematics by value, questions by the words they share with a gold answer.

Answers are hostile text: all that is done to them here takes linear time, and math-verify, which may not (`9^{9^{9}}`),
runs in a process of its own with a deadline (see `verifier`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from rewards import verifier
from trajectory import typography
from trajectory.types import Task

TOLERANCE = Fraction(1, 10**6)
"""Numbers closer than this are equal."""

QA_CORRECT_F1 = 0.5
"""From this token F1 on, an answer to a question counts as correct."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)  # of which `$+<=>^`|~` are symbols in Unicode
_EXACT_ONLY = {"yes", "no", "noanswer"}

# What changes how LaTeX looks, but not its value; `%` and degrees as MATH's own graders drop them.
_NOISE = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]|\\?[$%]|\^\\circ|\^\{\\circ\}")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3}){1,12}|\d{1,40})?(?:\.\d{0,40})?(?:[eE][-+]?\d{1,3})?")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d{1,40})\}\{([-+]?\d{1,40})\}|([-+]?\d{1,40})/(\d{1,40})")


@dataclass(frozen=True, slots=True)
class Outcome:
    value: float  # in [0, 1]: 1 or 0 for math, the best token F1 for QA
    correct: bool
    note: str = ""  # why an answer couldn't be compared


def score(answer: str | None, task: Task, timeout_s: float) -> Outcome:
    """Scores a final answer against the task's golds, the best of which counts; None is wrong.

    `timeout_s` bounds each comparison by math-verify.
    """
    if answer is None:
        return Outcome(0.0, False)
    if task.kind == "qa":
        value = max(qa_f1(answer, gold) for gold in task.golds)
        return Outcome(value, value >= QA_CORRECT_F1)
    verdicts = [math_equal(answer, gold, timeout_s) for gold in task.golds]
    correct = any(verdict.equal for verdict in verdicts)
    note = "" if correct else next((verdict.note for verdict in verdicts if verdict.note), "")
    return Outcome(float(correct), correct, note)


def math_equal(answer: str, gold: str, timeout_s: float) -> verifier.Verdict:
    """Whether two mathematical answers are equal: as cleaned LaTeX, as numbers or sets of numbers, or by math-verify."""
    cleaned, cleaned_gold = clean_latex(answer), clean_latex(gold)
    if cleaned and cleaned == cleaned_gold:
        return verifier.Verdict(True)
    values, gold_values = _values(cleaned), _values(cleaned_gold)
    if values is not None and gold_values is not None:
        close = all(abs(a - b) <= TOLERANCE for a, b in zip(values, gold_values, strict=False))
        if close and len(values) == len(gold_values):
            return verifier.Verdict(True)
        if "%" not in answer + gold:  # 50% may be 50 or 1/2: math-verify knows both
            return verifier.Verdict(False)
    return verifier.equal(answer, gold, timeout_s)


def clean_latex(text: str) -> str:
    """`text` without units, spaces and what else doesn't change its value: `x = 1{,}234\\text{ m}` becomes `1,234`."""
    text = _NOISE.sub("", " ".join(text.split())).replace("{,}", ",")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    without_units = _TEXT.sub("", text)
    text = without_units if without_units.strip() else _TEXT.sub(r"\1", text)
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)  # "1 1/2" keeps its space: it isn't 11/2
    text = re.sub(r"^[a-zA-Z]=", "", text)
    return text.rstrip(".")


def _values(text: str) -> list[Fraction] | None:
    """The numbers of a number, a set or a list without brackets (both sorted: their order means nothing); else None."""
    if (value := _number(text)) is not None:
        return [value]
    items = text.removeprefix("\\{").removesuffix("\\}").split(",")
    values = [value for item in items if (value := _number(item)) is not None]
    return sorted(values) if len(values) == len(items) else None


def _number(text: str) -> Fraction | None:
    if (match := _FRACTION.fullmatch(text)) is not None:
        sign, top, bottom = match[1] or "", match[2] or match[4], match[3] or match[5]
        value = Fraction(int(top), int(bottom)) if int(bottom) else None
        return -value if value is not None and sign == "-" else value
    if _NUMBER.fullmatch(text) is None or not any(c.isdigit() for c in text.lower().split("e")[0]):
        return None
    return Fraction(text.replace(",", ""))


def qa_f1(answer: str, gold: str) -> float:
    """Token F1 of the `normalise`d answers; yes, no and noanswer must match exactly."""
    answer, gold = normalise(answer), normalise(gold)
    if answer == gold:
        return 1.0
    if answer in _EXACT_ONLY or gold in _EXACT_ONLY:
        return 0.0
    words, gold_words = answer.split(), gold.split()
    shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * shared / (len(words) + len(gold_words)) if shared else 0.0


def normalise(text: str) -> str:
    """`text` in lower case, without LaTeX's fonts, punctuation of any script, articles, and doubled spaces."""
    text = typography.unwrap(typography.fold(text)).lower()
    text = "".join(c for c in text if c not in _PUNCTUATION and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", text).split())
