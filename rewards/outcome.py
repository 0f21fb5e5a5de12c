"""Decides whether the final answer is right: mathematics by value, questions by the words shared with a gold answer.

Answers are hostile text. The work that is done on them here takes milliseconds. math-verify may take longer
(`9^{9^{9}}`), so it runs in a process of its own with a deadline (see `verifier`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from rewards import math_text, verifier
from trajectory import typography
from trajectory.types import NoVerdict, Task

TOLERANCE = Fraction(1, 10**6)
"""Numbers that differ by less than this are equal if one of them is a decimal. Integers and fractions must be exact."""

SMALL = Fraction(1, 10**3)
"""Below this value the tolerance is relative, as 1.6e-19 isn't 0."""

QA_CORRECT_F1 = 0.5
"""Token F1 from which an answer to a question counts as correct."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_PUNCTUATION = frozenset(string.punctuation)  # Unicode calls some of these symbols: `$+<=>^`|~`
_EXACT_ONLY = {"yes", "no", "noanswer"}


@dataclass(frozen=True, slots=True)
class AnswerScore:
    value: float  # in [0, 1]: 1 or 0 for math, the best token F1 for QA
    correct: bool
    no_verdict: NoVerdict | None = None  # why an answer couldn't be compared
    note: str = ""  # the same with the details, for people


def score_answer(answer: str | None, task: Task, timeout_s: float) -> AnswerScore:
    """Score a final answer against the task's golds; the best match counts. None is wrong.

    `timeout_s` bounds each comparison by math-verify.
    """
    if answer is None:
        return AnswerScore(0.0, False)
    if task.kind == "qa":
        value = max(qa_f1(answer, gold) for gold in task.golds)
        return AnswerScore(value, value >= QA_CORRECT_F1)
    verdicts = [math_equal(answer, gold, timeout_s) for gold in task.golds]
    if any(verdict.equal for verdict in verdicts):
        return AnswerScore(1.0, True)
    missing = next((verdict for verdict in verdicts if verdict.no_verdict), verifier.Verdict(False))
    return AnswerScore(0.0, False, missing.no_verdict, missing.note)


def math_equal(answer: str, gold: str, timeout_s: float) -> verifier.Verdict:
    """Whether two mathematical answers are equal: as prepared text, as numbers or sets of numbers, or by math-verify.

    The order of a list or a set doesn't count, but that of a tuple does. A word that only one of them has (`\\text{red}`)
    makes them different, as math-verify would take it for a product of letters. So do different words or units behind the
    numbers of both, and different names of the values of both (`x=5` and `y=5`).
    """
    ours, theirs = math_text.prepare(answer), math_text.prepare(gold)
    if (
        ours.unit and theirs.unit and ours.unit != theirs.unit
    ):  # `6\text{ is prime}` and `6\text{ is odd}`, `6\%` and `6 kg`
        return verifier.Verdict(False)
    by_name, gold_by_name = ours.values_by_name(theirs), theirs.values_by_name(ours)
    if by_name and gold_by_name and by_name.keys() != gold_by_name.keys():
        return verifier.Verdict(False)
    fold = str.casefold if ours.is_words or theirs.is_words else str
    if ours.written and fold(ours.written) == fold(theirs.written):  # `5m` and `5\text{ m}`
        return verifier.Verdict(True)
    if by_name and gold_by_name and len(by_name) > 1:
        return _all(_same_set(by_name[name], gold_by_name[name], timeout_s) for name in gold_by_name)
    if ours.compact and fold(ours.compact) == fold(theirs.compact):
        return verifier.Verdict(True)
    if _has_other_words(ours, theirs) or _has_other_words(theirs, ours):
        return verifier.Verdict(False)
    if "=" in theirs.latex:
        return _ask(ours.named, theirs.named, timeout_s)
    if _is_equation_in(ours, theirs.names):
        return verifier.Verdict(False)
    if (verdict := _same_order(ours, theirs, timeout_s)) is not None:
        return verdict
    if len(ours.items) == 1 and not ours.is_set:
        return _all(_same_set((side,), theirs.items, timeout_s) for side in math_text.sides_to_check(ours.latex))
    return _same_set(ours.items, theirs.items, timeout_s)


def _has_other_words(text: math_text.MathText, other: math_text.MathText) -> bool:
    return any(word not in other.latex.lower() for word in text.words)


def _is_equation_in(text: math_text.MathText, names: tuple[str, ...]) -> bool:
    """Whether `text` is an equation in an unknown for which the gold answer gives the solution: `2x=7` for `x = 7/2`."""
    letters = _COMMAND.sub("", text.latex)
    return len(names) == 1 and letters.count("=") == 1 and names[0] != "" and names[0] in letters


def _same_order(ours: math_text.MathText, theirs: math_text.MathText, timeout_s: float) -> verifier.Verdict | None:
    """The verdict about a tuple and a tuple or a list without brackets. Their order counts."""
    pair, gold_pair = _as_tuple(ours), _as_tuple(theirs)
    if pair and gold_pair:
        return _same_tuple(pair, gold_pair, timeout_s)
    brackets, parts = pair or gold_pair or ("", ())
    other = theirs if pair else ours
    if not parts or len(other.items) == 1:
        return None
    if other.is_set:
        return None if any(ours.names + theirs.names) else verifier.Verdict(False)
    if brackets != "()":
        return verifier.Verdict(False)
    return _same_tuple(
        (brackets, ours.items if gold_pair else parts), (brackets, theirs.items if pair else parts), timeout_s
    )


def _as_tuple(text: math_text.MathText) -> tuple[str, tuple[str, ...]] | None:
    """The brackets and the parts of a tuple. `x=1, y=2` is a tuple, too."""
    if text.is_set:
        return None
    if len(text.items) == 1:
        return math_text.components(text.items[0])
    plain = {name for name in text.names if name and "_" not in name}  # `x_1` and `x_2` may come in either order
    return ("()", text.items) if len(plain) == len(text.items) else None


def _same_tuple(
    pair: tuple[str, tuple[str, ...]], gold_pair: tuple[str, tuple[str, ...]], timeout_s: float
) -> verifier.Verdict:
    (brackets, parts), (gold_brackets, gold_parts) = pair, gold_pair
    if len(parts) != len(gold_parts):
        return verifier.Verdict(False)
    if len(parts) == 2 and brackets != gold_brackets:  # with three parts, `[1,2,3]` and `(1,2,3)`, it is no interval
        return verifier.Verdict(False)
    return _all(_same(part, gold, timeout_s) for part, gold in zip(parts, gold_parts, strict=True))


def _same_set(items: tuple[str, ...], gold_items: tuple[str, ...], timeout_s: float) -> verifier.Verdict:
    if len(items) == len(gold_items) == 1:
        return _same(items[0], gold_items[0], timeout_s)
    values, gold_values = _values(items), _values(gold_items)
    if values is not None and gold_values is not None:
        if len(values) == len(gold_values) and all(map(_close, values, gold_values)):
            return verifier.Verdict(True)
        if "%" not in "".join(items + gold_items):
            return verifier.Verdict(False)
    return _ask(_one_text(items), _one_text(gold_items), timeout_s)


def _same(answer: str, gold: str, timeout_s: float) -> verifier.Verdict:
    """The verdict about two values, neither of which is a list without brackets or a set."""
    if math_text.compact(answer) == math_text.compact(gold) != "":
        return verifier.Verdict(True)
    pair, gold_pair = math_text.components(answer), math_text.components(gold)
    if pair and gold_pair:
        return _same_tuple(pair, gold_pair, timeout_s)
    values, gold_values = _values((answer,)), _values((gold,))
    if values is not None and gold_values is not None:
        if _close(values[0], gold_values[0]):
            return verifier.Verdict(True)
        if "%" not in answer + gold:  # 50% may be 50 or 1/2, and math-verify accepts both
            return verifier.Verdict(False)
    return _ask(answer, gold, timeout_s)


def _ask(answer: str, gold: str, timeout_s: float) -> verifier.Verdict:
    """math-verify's verdict, unless it can't see the difference: for it `f'` is `f`, `123_5` is 123 and `E` is e."""
    if math_text.marks(answer) != math_text.marks(gold) or (len(answer) == len(gold) == 1 and answer != gold):
        return verifier.Verdict(False)
    return verifier.equal(answer, gold, timeout_s)


def _all(verdicts: Iterable[verifier.Verdict]) -> verifier.Verdict:
    """The first of `verdicts` that isn't equal. Verdicts after it aren't computed."""
    return next((verdict for verdict in verdicts if not verdict.equal), verifier.Verdict(True))


def _one_text(items: tuple[str, ...]) -> str:
    return items[0] if len(items) == 1 else f"\\{{{', '.join(items)}\\}}"


def _values(items: tuple[str, ...]) -> list[tuple[Fraction, bool]] | None:
    """The items' values, sorted, each with whether it may be rounded; None unless all are numbers."""
    values = [(value, math_text.is_rounded(item)) for item in items if (value := math_text.number(item)) is not None]
    return sorted(values) if len(values) == len(items) else None


def _close(a: tuple[Fraction, bool], b: tuple[Fraction, bool]) -> bool:
    (value, rounded), (gold, gold_rounded) = a, b
    if not (rounded or gold_rounded):
        return value == gold
    size = max(abs(value), abs(gold))
    return abs(value - gold) <= TOLERANCE * (1 if size >= SMALL else size)


def qa_f1(answer: str, gold: str) -> float:
    """Token F1 of the `normalise`d answers. yes, no and noanswer must match exactly."""
    answer, gold = normalise(answer), normalise(gold)
    if answer == gold:
        return 1.0
    if answer in _EXACT_ONLY or gold in _EXACT_ONLY:
        return 0.0
    words, gold_words = answer.split(), gold.split()
    shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * shared / (len(words) + len(gold_words)) if shared else 0.0


def normalise(text: str) -> str:
    """`text` in lower case, without LaTeX's fonts and spaces, punctuation of any script, articles, and double spaces."""
    text = typography.unwrap(typography.plain_spaces(typography.fold(text))).lower()
    text = "".join(c for c in text if c not in _PUNCTUATION and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", text).split())
