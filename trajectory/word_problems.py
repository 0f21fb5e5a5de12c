"""Templated word problems with numbers too large for a tiny model's head: what the embedded default learns on.

Each is a story around an arithmetic expression of one or two operations, at least one of them a multiplication:

    Leo has 631 stamps and buys 98 bags of 4 stamps each. How many stamps does Leo have now?      631+98*4 = 1023

Train and evaluation share no problem: a hash of the numbers (in order of size) and the answer decides the split, so
neither another name nor another story nor "4 bags of 98" carries a problem across.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal, get_args

from trajectory.types import Task

Split = Literal["train", "eval"]

EVAL_SHARE = 10
"""One problem in so many belongs to the evaluation split."""

MAX_NUM = {"train": 200_000, "eval": 20_000}
"""Most problems that one call gives; the templates hold over ten times as many, so drawing unseen ones stays quick."""

NAMES = ("Leo", "Mia", "Sam", "Ana", "Max", "Eva", "Ben", "Zoe", "Tom", "Lily", "Omar", "Nina")
ITEMS = ("stamps", "coins", "cards", "pens", "books", "apples", "shells", "beads", "nails", "seeds", "eggs", "stones")


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A way to tell one kind of expression; `{a}`, `{b}`, `{c}` are its numbers in the story's order."""

    story: str
    expression: str
    value: Callable[..., int]
    ranges: tuple[tuple[int, int], ...]  # inclusive, one for each number


@dataclass(frozen=True, slots=True, kw_only=True)
class WordProblem:
    """A told problem and the expression that solves it."""

    question: str
    expression: str  # Python, e.g. "631+98*4"
    answer: int
    key: str  # the same for problems that differ only in words or in the order of the numbers

    @property
    def split(self) -> Split:
        digest = hashlib.sha256(self.key.encode()).digest()
        return "eval" if int.from_bytes(digest[:8], "big") % EVAL_SHARE == 0 else "train"

    @property
    def task(self) -> Task:
        digest = hashlib.sha256(self.question.encode()).hexdigest()
        return Task(id=f"word-problem-{digest[:16]}", question=self.question, golds=(str(self.answer),))


ONE_DIGIT, TWO_DIGITS, THREE_DIGITS = (3, 9), (12, 99), (100, 999)

TEMPLATES = (
    Template(
        story="{name} fills {a} boxes with {b} {item} each. How many {item} does {name} pack?",
        expression="{a}*{b}",
        value=lambda a, b: a * b,
        ranges=(THREE_DIGITS, TWO_DIGITS),
    ),
    Template(
        story="A shop sells {a} {item} a day. How many {item} does it sell in {b} days?",
        expression="{a}*{b}",
        value=lambda a, b: a * b,
        ranges=(THREE_DIGITS, TWO_DIGITS),
    ),
    Template(
        story="{name} has {a} {item} and buys {b} bags of {c} {item} each. How many {item} does {name} have now?",
        expression="{a}+{b}*{c}",
        value=lambda a, b, c: a + b * c,
        ranges=(THREE_DIGITS, TWO_DIGITS, ONE_DIGIT),
    ),
    Template(
        story="{name} gets {a} {item} on each of {b} days and then finds {c} more. How many {item} does {name} get?",
        expression="{a}*{b}+{c}",
        value=lambda a, b, c: a * b + c,
        ranges=(THREE_DIGITS, ONE_DIGIT, THREE_DIGITS),
    ),
    Template(
        story="{name} buys {a} crates of {b} {item} and gives away {c} {item}. How many {item} are left?",
        expression="{a}*{b}-{c}",
        value=lambda a, b, c: a * b - c,
        ranges=(THREE_DIGITS, TWO_DIGITS, THREE_DIGITS),  # 100 * 12 > 999: never less than nothing
    ),
    Template(
        story="A store has {a} {item}. {name} takes {b} packs of {c} {item} each. How many {item} stay in the store?",
        expression="{a}-{b}*{c}",
        value=lambda a, b, c: a - b * c,
        ranges=((500, 999), (12, 49), ONE_DIGIT),  # 500 > 49 * 9
    ),
    Template(
        story="{name} packs {a} red and {b} blue {item} each day. How many {item} does {name} pack in {c} days?",
        expression="({a}+{b})*{c}",
        value=lambda a, b, c: (a + b) * c,
        ranges=(THREE_DIGITS, THREE_DIGITS, TWO_DIGITS),
    ),
    Template(
        story="A hall has {a} shelves. Each holds {b} boxes of {c} {item}. How many {item} are in the hall?",
        expression="{a}*{b}*{c}",
        value=lambda a, b, c: a * b * c,
        ranges=(TWO_DIGITS, ONE_DIGIT, THREE_DIGITS),
    ),
)


def draw(random: Random) -> WordProblem:
    """One problem of either split."""
    template = random.choice(TEMPLATES)
    numbers = [random.randint(low, high) for low, high in template.ranges]
    words: dict[str, str | int] = dict(zip("abc", numbers, strict=False))
    answer = template.value(*numbers)
    return WordProblem(
        question=template.story.format(name=random.choice(NAMES), item=random.choice(ITEMS), **words),
        expression=template.expression.format(**words),
        answer=answer,
        key=f"{sorted(numbers)} {answer}",
    )


def problems(split: Split, seed: int = 0) -> Iterator[WordProblem]:
    """An endless run of different problems of one split, the same in every process."""
    random = Random(f"word-problems/{split}/{seed}")  # seeding with a string hashes it with SHA-512, not with `hash`
    seen: set[str] = set()
    while True:
        problem = draw(random)
        if problem.split == split and problem.key not in seen:
            seen.add(problem.key)
            yield problem


def generate(split: Split, num: int, seed: int = 0) -> list[Task]:
    """`num` different tasks of one split. Those of a smaller `num` are the first of those of a larger one.

    Raises ValueError for an unknown split and for a `num` that is negative or above `MAX_NUM`.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; word problems have {get_args(Split)}")
    if not 0 <= num <= MAX_NUM[split]:
        raise ValueError(f"num is {num}; the {split!r} split of word problems gives 0 to {MAX_NUM[split]} at a time")
    return [problem.task for problem in islice(problems(split, seed), num)]
