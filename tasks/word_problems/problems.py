"""Word problems from templates, with numbers that a tiny model can't compute by itself. The embedded default learns on them.

Each problem is a story around an arithmetic expression. Those of the tier `easy` have one or two operations, at least one of
them a multiplication; the harder tiers are in `hard.py`:

    Leo has 631 stamps and buys 98 bags of 4 stamps each. How many stamps does Leo have now?      631+98*4 = 1023

The splits `train` and `eval` share no problem, in any tier. A hash of the numbers (in order of size) and the answer decides
the split, so another name, another story or "4 bags of 98" can't move a problem into the other split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal, get_args

from tasks.word_problems import hard
from tasks.word_problems.types import ITEMS, NAMES, ONE_DIGIT, THREE_DIGITS, TWO_DIGITS, SolutionCall, Tier, WordProblem
from trajectory.types import Task

Split = Literal["train", "eval"]

MAX_NUM = {"train": 200_000, "eval": 20_000}
"""Most problems that one call gives. The templates hold over ten times as many, so drawing unseen ones stays fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A template of one kind of expression. `{a}`, `{b}`, `{c}` are its numbers in the story's order."""

    story: str
    expression: str
    value: Callable[..., int]
    ranges: tuple[tuple[int, int], ...]  # inclusive, one for each number


ONLY_EASY: Mapping[Tier, float] = {"easy": 1.0}

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
        ranges=(THREE_DIGITS, TWO_DIGITS, THREE_DIGITS),  # 100 * 12 > 999: the result is never negative
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
    """One easy problem, from either split."""
    template = random.choice(TEMPLATES)
    numbers = [random.randint(low, high) for low, high in template.ranges]
    words: dict[str, str | int] = dict(zip("abc", numbers, strict=False))
    answer = template.value(*numbers)
    expression = template.expression.format(**words)
    return WordProblem(
        question=template.story.format(name=random.choice(NAMES), item=random.choice(ITEMS), **words),
        expression=expression,
        answer=answer,
        key=f"{sorted(numbers)} {answer}",
        calls=(SolutionCall(tool="code", content=expression, output=str(answer)),),
    )


def draw_tier(tier: Tier, random: Random) -> WordProblem:
    """One problem of `tier`, from either split."""
    return draw(random) if tier == "easy" else hard.draw(tier, random)


def problems(split: Split, seed: int = 0, tier: Tier = "easy") -> Iterator[WordProblem]:
    """An endless sequence of different problems of one split and one tier, the same in every process."""
    # A string seed is hashed with SHA-512, and not with `hash`, which differs between processes.
    random = Random(f"word-problems/{split}/{seed}" + ("" if tier == "easy" else f"/{tier}"))
    seen: set[str] = set()
    while True:
        problem = draw_tier(tier, random)
        if problem.split == split and problem.key not in seen:
            seen.add(problem.key)
            yield problem


def mixed(split: Split, seed: int = 0, tiers: Mapping[Tier, float] = ONLY_EASY) -> Iterator[WordProblem]:
    """An endless sequence of different problems of one split. Each tier's frequency is its share of all shares."""
    tiers = {tier: share for tier, share in tiers.items() if share > 0}
    if list(tiers) == ["easy"]:
        yield from problems(split, seed)
    random = Random(f"word-problems/{split}/{seed}/tiers")
    # In the declared order, not the mapping's: two ways to write the same shares give the same problems.
    names = [tier for tier in get_args(Tier) if tier in tiers]
    runs = {tier: problems(split, seed, tier) for tier in names}
    while True:
        (tier,) = random.choices(names, weights=[tiers[name] for name in names])
        yield next(runs[tier])


def generate(split: Split, num: int, seed: int = 0, tiers: Mapping[Tier, float] = ONLY_EASY) -> list[Task]:
    """`num` different tasks of one split, from the tiers according to their shares. A smaller `num` gives the first tasks
    of a larger one.

    Raises ValueError for an unknown split, for a `num` that is negative or above `MAX_NUM`, and for tiers without any
    share.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; word problems have {get_args(Split)}")
    if not 0 <= num <= MAX_NUM[split]:
        raise ValueError(f"num is {num}; the {split!r} split of word problems gives 0 to {MAX_NUM[split]} at a time")
    if unknown := [tier for tier in tiers if tier not in get_args(Tier)]:
        raise ValueError(f"tiers are {', '.join(get_args(Tier))}; there is no {unknown[0]!r}")
    if min(tiers.values(), default=0) < 0 or not 0 < sum(tiers.values()) < float("inf"):
        raise ValueError(
            f"the shares of the tiers are {dict(tiers)}; they must not be negative, and one must be positive"
        )
    return [problem.task for problem in islice(mixed(split, seed, tiers), num)]
