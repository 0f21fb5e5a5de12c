"""Is the final answer right? Mathematics by value, questions by the words they share with a gold answer.

Answers are hostile text: what is done to them here takes milliseconds, and math-verify, which may not (`9^{9^{9}}`),
runs in a process of its own with a deadline (see `verifier`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from rewards import math_text, verifier
from trajectory import typography
from trajectory.types import Task

TOLERANCE = Fraction(1, 10**6)
"""Numbers closer than this are equal."""

SMALL = Fraction(1, 10**3)
"""Below this the tolerance is relative: 1.6e-19 isn't 0."""

QA_CORRECT_F1 = 0.5
"""From this token F1 on, an answer to a question counts as correct."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)  # of which `$+<=>^`|~` are symbols in Unicode
_EXACT_ONLY = {"yes", "no", "noanswer"}


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
    """Whether two mathematical answers are equal: as prepared text, as numbers or sets of numbers, or by math-verify.

    The order of a list or a set means nothing, the order of a tuple does. A word that only one of them has (`\\text{red}`)
    makes them different: math-verify would take it for a product of letters. So do different words or units
    behind the numbers of both.
    """
    ours, theirs = math_text.prepare(answer), math_text.prepare(gold)
    if ours.unit and theirs.unit and ours.unit != theirs.unit:  # `6\text{ is prime}`: what was dropped isn't the same
        return verifier.Verdict(False)
    fold = str.casefold if ours.words or theirs.words else str
    if ours.compact and fold(ours.compact) == fold(theirs.compact):
        return verifier.Verdict(True)
    if _has_other_words(ours, theirs) or _has_other_words(theirs, ours):
        return verifier.Verdict(False)
    if "=" in theirs.latex:  # an equation, of which `y =` is a part
        return verifier.equal(ours.named, theirs.named, timeout_s)
    if len(ours.items) == 1:
        for side in math_text.sides_to_check(ours.latex):
            verdict = _equal(side, (side,), theirs, timeout_s)
            if not verdict.equal:
                return verdict
        return verifier.Verdict(True)
    return _equal(ours.latex, ours.items, theirs, timeout_s)


def _has_other_words(text: math_text.MathText, other: math_text.MathText) -> bool:
    return any(word not in other.latex.lower() for word in text.words)


def _equal(latex: str, items: tuple[str, ...], gold: math_text.MathText, timeout_s: float) -> verifier.Verdict:
    values, gold_values = _values(items), _values(gold.items)
    if values is not None and gold_values is not None:
        if len(values) == len(gold_values) and all(map(_close, values, gold_values)):
            return verifier.Verdict(True)
        if "%" not in latex + gold.latex:  # 50% may be 50 or 1/2: math-verify knows both
            return verifier.Verdict(False)
    return verifier.equal(latex, gold.latex, timeout_s)


def _values(items: tuple[str, ...]) -> list[Fraction] | None:
    """The items' values, sorted, if all are numbers."""
    values = [value for item in items if (value := math_text.number(item)) is not None]
    return sorted(values) if len(values) == len(items) else None


def _close(a: Fraction, b: Fraction) -> bool:
    size = max(abs(a), abs(b))
    return abs(a - b) <= TOLERANCE * (1 if size >= SMALL else size)


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
