"""Word problems that are harder than `easy`: longer sums, irrelevant numbers, units, two dependent sums, and lookups.

Mia packs 412 cards an hour. How many cards does Mia pack in 7 days?                       412*24*7
Leo fills 631 boxes with 98 stamps each. Eva has 3 times as many stamps, less 120. How …   631*98, then 61838*3-120
Sam buys a blue lamp from Oslo for each of 25 friends and pays 300 dollars for the trip. …   search, then 31*25+300
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Literal

from tasks.word_problems.corpus import COLOURS, THINGS, TOWNS, Fact
from tasks.word_problems.types import (
    ITEMS,
    NAMES,
    ONE_DIGIT,
    THREE_DIGITS,
    TWO_DIGITS,
    SolutionCall,
    WordProblem,
    evaluate,
)

HardTier = Literal["steps", "distractors", "units", "chained", "lookup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A template of one kind of problem. `{a}`, `{b}`, … are its numbers in the story's order; a number that is in no sum
    is irrelevant. `{friend}` is another name, `{other}` another item. A sum may use `{first}`, the result of the sum before
    it, and `{price}`, the price of `{wanted}`, which must be looked up."""

    story: str
    sums: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]  # inclusive, one for each number


STEPS = (
    Story(
        story="{name} fills {a} boxes with {b} {item} each and {c} bags with {d} {item} each. "
        "How many {item} does {name} pack?",
        sums=("{a}*{b}+{c}*{d}",),
        ranges=(THREE_DIGITS, TWO_DIGITS, TWO_DIGITS, ONE_DIGIT),
    ),
    Story(
        story="A store has {a} red and {b} blue {item}. {name} takes {c} packs of {d} {item} each. "
        "How many {item} stay in the store?",
        sums=("{a}+{b}-{c}*{d}",),
        ranges=((500, 999), THREE_DIGITS, (12, 49), ONE_DIGIT),  # 500 > 49 * 9
    ),
    Story(
        story="{name} gets {a} {item} on each of {b} days, buys {c} bags of {d} {item} each and gives away {e} {item}. "
        "How many {item} are left?",
        sums=("{a}*{b}+{c}*{d}-{e}",),
        ranges=(THREE_DIGITS, TWO_DIGITS, TWO_DIGITS, ONE_DIGIT, THREE_DIGITS),  # 100 * 12 > 999
    ),
    Story(
        story="{name} packs {a} red and {b} blue {item} each day for {c} days and then buys {d} bags of {e} {item} each. "
        "How many {item} does {name} have?",
        sums=("({a}+{b})*{c}+{d}*{e}",),
        ranges=(THREE_DIGITS, THREE_DIGITS, ONE_DIGIT, TWO_DIGITS, ONE_DIGIT),
    ),
    Story(
        story="{name} buys {a} crates of {b} {item}, {c} bags of {d} {item} and {e} packs of {f} {item}. "
        "How many {item} does {name} buy?",
        sums=("{a}*{b}+{c}*{d}+{e}*{f}",),
        ranges=(THREE_DIGITS, TWO_DIGITS, TWO_DIGITS, ONE_DIGIT, TWO_DIGITS, ONE_DIGIT),
    ),
)

DISTRACTORS = (
    Story(
        story="{name} is {a} years old and fills {b} boxes with {c} {item} each. How many {item} does {name} pack?",
        sums=("{b}*{c}",),
        ranges=(TWO_DIGITS, THREE_DIGITS, TWO_DIGITS),
    ),
    Story(
        story="A shop opened {a} years ago and sells {b} {item} a day. How many {item} does it sell in {c} days?",
        sums=("{b}*{c}",),
        ranges=(TWO_DIGITS, THREE_DIGITS, TWO_DIGITS),
    ),
    Story(
        story="{name} has {a} {item} and {b} {other} and buys {c} bags of {d} {item} each. "
        "How many {item} does {name} have now?",
        sums=("{a}+{c}*{d}",),
        ranges=(THREE_DIGITS, THREE_DIGITS, TWO_DIGITS, ONE_DIGIT),
    ),
    Story(
        story="{name} pays {a} dollars for {b} crates of {c} {item} and gives away {d} {item}. How many {item} are left?",
        sums=("{b}*{c}-{d}",),
        ranges=(THREE_DIGITS, THREE_DIGITS, TWO_DIGITS, THREE_DIGITS),
    ),
    Story(
        story="{name} has {a} {other} and packs {b} red and {c} blue {item} each day. "
        "How many {item} does {name} pack in {d} days?",
        sums=("({b}+{c})*{d}",),
        ranges=(THREE_DIGITS, THREE_DIGITS, THREE_DIGITS, TWO_DIGITS),
    ),
)

UNITS = (
    Story(
        story="{name} buys {a} dozen {item} and gives away {b} {item}. How many {item} are left?",
        sums=("{a}*12-{b}",),
        ranges=(THREE_DIGITS, THREE_DIGITS),  # 100 * 12 > 999
    ),
    Story(
        story="A shop sells {a} {item} a day. How many {item} does it sell in {b} weeks?",
        sums=("{a}*7*{b}",),
        ranges=(THREE_DIGITS, TWO_DIGITS),
    ),
    Story(
        story="{name} packs {a} {item} an hour. How many {item} does {name} pack in {b} days?",
        sums=("{a}*24*{b}",),
        ranges=(THREE_DIGITS, TWO_DIGITS),
    ),
    Story(
        story="{name} has {a} {item} and buys {b} boxes of {c} dozen {item} each. How many {item} does {name} have now?",
        sums=("{a}+{b}*{c}*12",),
        ranges=(THREE_DIGITS, TWO_DIGITS, ONE_DIGIT),
    ),
    Story(
        story="A shop sells {a} {item} a day for {b} weeks and then {c} dozen more. How many {item} does it sell?",
        sums=("{a}*7*{b}+{c}*12",),
        ranges=(THREE_DIGITS, TWO_DIGITS, TWO_DIGITS),
    ),
)

CHAINED = (
    Story(
        story="{name} fills {a} boxes with {b} {item} each. {friend} has {c} times as many {item}, less {d}. "
        "How many {item} does {friend} have?",
        sums=("{a}*{b}", "{first}*{c}-{d}"),
        ranges=(THREE_DIGITS, TWO_DIGITS, ONE_DIGIT, THREE_DIGITS),
    ),
    Story(
        story="A shop sells {a} {item} a day for {b} days. Then it sells {c} times as many, and {d} more. "
        "How many {item} does it sell then?",
        sums=("{a}*{b}", "{first}*{c}+{d}"),
        ranges=(THREE_DIGITS, TWO_DIGITS, ONE_DIGIT, THREE_DIGITS),
    ),
    Story(
        story="{name} packs {a} red and {b} blue {item}. {friend} packs {c} boxes of as many each and gives away {d} "
        "{item}. How many {item} are left?",
        sums=("{a}+{b}", "{first}*{c}-{d}"),
        ranges=(THREE_DIGITS, THREE_DIGITS, TWO_DIGITS, THREE_DIGITS),
    ),
    Story(
        story="{name} buys {a} bags of {b} {item}. {friend} buys {c} {item} more than {name}, on each of {d} days. "
        "How many {item} does {friend} buy?",
        sums=("{a}*{b}", "({first}+{c})*{d}"),
        ranges=(THREE_DIGITS, ONE_DIGIT, THREE_DIGITS, ONE_DIGIT),
    ),
)

LOOKUP = (
    Story(
        story="{name} buys {wanted} for each of {a} friends. How many dollars does {name} pay?",
        sums=("{price}*{a}",),
        ranges=((100, 9999),),
    ),
    Story(
        story="{name} buys {wanted} for each of {a} friends and pays {b} dollars for the trip. "
        "How many dollars does {name} pay?",
        sums=("{price}*{a}+{b}",),
        ranges=(THREE_DIGITS, THREE_DIGITS),
    ),
    Story(
        story="{name} has {a} dollars and buys {wanted} for each of {b} friends. How many dollars are left?",
        sums=("{a}-{price}*{b}",),
        ranges=((900, 9999), ONE_DIGIT),  # 900 > 99 * 9
    ),
)

STORIES: dict[HardTier, tuple[Story, ...]] = {
    "steps": STEPS,
    "distractors": DISTRACTORS,
    "units": UNITS,
    "chained": CHAINED,
    "lookup": LOOKUP,
}


def draw(tier: HardTier, random: Random) -> WordProblem:
    """One problem of `tier`, from either split."""
    story = random.choice(STORIES[tier])
    numbers: dict[str, object] = {
        letter: random.randint(low, high) for letter, (low, high) in zip("abcdef", story.ranges, strict=False)
    }
    name, friend = random.sample(NAMES, 2)
    item, other = random.sample(ITEMS, 2)
    words: dict[str, object] = {"name": name, "friend": friend, "item": item, "other": other}
    calls: list[SolutionCall] = []
    if tier == "lookup":
        fact = Fact(random.choice(COLOURS), random.choice(THINGS), random.choice(TOWNS))
        words["wanted"] = fact.query
        numbers["price"] = fact.price
        calls.append(SolutionCall(tool="search", content=fact.query, output=fact.id))
    whole = ""
    for text in story.sums:
        content = text.format(**numbers)
        whole = text.format(**numbers | {"first": f"({whole})"})
        numbers["first"] = evaluate(content)
        calls.append(SolutionCall(tool="code", content=content, output=str(numbers["first"])))
    answer = int(calls[-1].output)
    return WordProblem(
        question=story.story.format(**words, **numbers),
        expression=whole,
        answer=answer,
        # Only numbers of the sums count: a different irrelevant number doesn't make another problem.
        key=f"{sorted(int(n) for n in re.findall(r'[0-9]+', whole))} {answer}",
        tier=tier,
        calls=tuple(calls),
    )
