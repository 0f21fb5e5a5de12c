"""The type of a word problem of any tier: its question, the tool calls that solve it, and the words of its story."""

from __future__ import annotations

import ast
import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trajectory.types import Task

Tier = Literal["easy", "steps", "distractors", "units", "chained", "lookup"]
"""How hard a problem is: one or two operations (`easy`); three to five (`steps`); irrelevant numbers (`distractors`);
dozens, weeks and hours (`units`); a second sum that needs the first's result (`chained`); a price that only the corpus
contains (`lookup`)."""

EVAL_SHARE = 10
"""One problem in this many belongs to the evaluation split."""

NAMES = ("Leo", "Mia", "Sam", "Ana", "Max", "Eva", "Ben", "Zoe", "Tom", "Lily", "Omar", "Nina")
ITEMS = ("stamps", "coins", "cards", "pens", "books", "apples", "shells", "beads", "nails", "seeds", "eggs", "stones")

ONE_DIGIT, TWO_DIGITS, THREE_DIGITS = (3, 9), (12, 99), (100, 999)

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SolutionCall:
    """One tool call of a problem's solution."""

    tool: Literal["code", "search"]
    content: str  # a sum as a Python expression, or a query
    output: str  # the sum's value, or the id of the document with the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class WordProblem:
    """A problem as text, and the expression that solves it."""

    question: str
    expression: str  # Python, e.g. "631+98*4"; for a problem of two sums, the whole
    answer: int
    key: str  # the same for problems that differ only in words or in the order of their numbers
    tier: Tier = "easy"
    calls: tuple[SolutionCall, ...] = ()  # the solution, call by call; the last one's output is the answer

    @property
    def split(self) -> Literal["train", "eval"]:
        digest = hashlib.sha256(self.key.encode()).digest()
        return "eval" if int.from_bytes(digest[:8], "big") % EVAL_SHARE == 0 else "train"

    @property
    def task(self) -> Task:
        digest = hashlib.sha256(self.question.encode()).hexdigest()
        return Task(id=f"word-problem-{digest[:16]}", question=self.question, golds=(str(self.answer),))


def evaluate(expression: str) -> int:
    """The value of a sum of integers with +, -, * and parentheses. ValueError or SyntaxError for anything else. Nothing is
    executed."""
    return _value(ast.parse(expression.strip(), mode="eval").body)


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
    raise ValueError(f"not a sum: {ast.unparse(node)}")
