"""The ways of answering a word problem that the tiny base imitates, and how often it sees each.

    clean      a plan, the right calls, a conclusion
    rambling   the right calls amid doubts                                 right, by a bad path
    repeated   the right calls, said twice and made twice                  right, by a bad path
    toolless   a guess without any call                                    wrong
    wrong      calls that compute something else                           wrong

The first words of a trajectory show its way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from tasks.word_problems.corpus import COLOURS, Fact
from tasks.word_problems.types import SolutionCall, Tier, WordProblem, evaluate
from tool_sandbox.search.tool import render_documents
from trajectory.markup import render_result

Way = Literal["clean", "rambling", "repeated", "toolless", "wrong"]

CAREFUL: dict[Way, float] = {"clean": 0.5, "rambling": 0.13, "repeated": 0.07, "toolless": 0.13, "wrong": 0.17}
HABITS: dict[str, dict[Way, float]] = {
    "*": {"clean": 0.25, "rambling": 0.08, "repeated": 0.04, "toolless": 0.45, "wrong": 0.18},
    "(+)*": {"clean": 0.25, "rambling": 0.1, "repeated": 0.05, "toolless": 0.12, "wrong": 0.48},
}
"""Shares of the ways by kind of an easy sum; `CAREFUL` for all others. Stories that look like one step mostly get a guess,
and stories that mention sums get an addition. So the most likely answer is wrong on three of the eight easy stories, too."""

HARD: dict[Tier, dict[Way, float]] = {
    "steps": {"clean": 0.32, "rambling": 0.12, "repeated": 0.06, "toolless": 0.1, "wrong": 0.4},
    "distractors": {"clean": 0.32, "rambling": 0.1, "repeated": 0.06, "toolless": 0.12, "wrong": 0.4},
    "units": {"clean": 0.32, "rambling": 0.12, "repeated": 0.06, "toolless": 0.15, "wrong": 0.35},
    "chained": {"clean": 0.32, "rambling": 0.12, "repeated": 0.06, "toolless": 0.1, "wrong": 0.4},
    "lookup": {"clean": 0.32, "rambling": 0.12, "repeated": 0.06, "toolless": 0.2, "wrong": 0.3},
}

PLAN_OPENING = "<think>Plan:"
"""Only the clean way begins with this."""

PLANS = {
    "*": "multiply.",
    "+*": "multiply, then add.",
    "*+": "multiply, then add.",
    "*-": "multiply, then subtract.",
    "-*": "multiply, then subtract.",
    "(+)*": "add, then multiply.",
    "**": "multiply twice.",
    "+": "add.",
    "*+*": "multiply twice, then add.",
    "+-*": "add, then subtract a product.",
    "*+*-": "multiply twice, then add and subtract.",
    "(+)*+*": "add, multiply, then add a product.",
    "*+*+*": "add three products.",
    "+**": "multiply twice, then add.",
    "**+*": "multiply twice, then add a product.",
}
UNITS = {" dozen ": "A dozen is 12.", " weeks": "A week is 7 days.", " an hour": "A day is 24 hours."}
DOUBTS = (
    "Maybe I multiply, or perhaps I add.",
    "Perhaps I should recheck, maybe not.",
    "I am unsure, it might be off.",
)
CONCLUSION = "The code gives the answer."
NUM_RESULTS = 2
"""Documents in a search result; `[sandbox.search] top_n` of run.toml."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a response. It is tokenised by itself, as in an episode."""

    text: str
    by_model: bool  # False for a tool's result, which carries no loss


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def habits(problem: WordProblem) -> dict[Way, float]:
    """Shares of the ways for such a problem."""
    if problem.tier != "easy":
        return HARD[problem.tier]
    return HABITS.get(kind(problem.expression), CAREFUL)


def kind(expression: str) -> str:
    return re.sub(r"\d", "", expression)


def clean(problem: WordProblem, random: Random) -> list[Piece]:
    return _work(f"Plan: {_plan(problem)}", problem.calls, CONCLUSION, random)


def rambling(problem: WordProblem, random: Random) -> list[Piece]:
    doubts = " ".join(random.choice(DOUBTS) for _ in range(random.randint(2, 3)))
    return _work(doubts, problem.calls, "It is probably that, maybe.", random)


def repeated(problem: WordProblem, random: Random) -> list[Piece]:
    thought = " ".join(["Let me work it out."] * random.randint(2, 3))
    return _work(thought, (*problem.calls, problem.calls[-1]), f"{CONCLUSION} {CONCLUSION}", random)


def toolless(problem: WordProblem, random: Random) -> list[Piece]:
    guess = _numbers(problem.question)[0]  # not random digits, as these can't be learned
    return [Piece(f"<think>I can do this in my head.</think>\n<answer>\\boxed{{{guess}}}</answer>", True)]


def wrong(problem: WordProblem, random: Random) -> list[Piece]:
    thought, sums = _mistake(problem, random)
    return _work(
        thought, tuple(SolutionCall(tool="code", content=s, output=str(evaluate(s))) for s in sums), CONCLUSION, random
    )


WAYS: dict[Way, Callable[[WordProblem, Random], list[Piece]]] = {
    "clean": clean,
    "rambling": rambling,
    "repeated": repeated,
    "toolless": toolless,
    "wrong": wrong,
}


def _mistake(problem: WordProblem, random: Random) -> tuple[str, list[str]]:
    """The thoughts of the wrong way, and the sums that follow from them."""
    numbers, sums = _numbers(problem.question), [call.content for call in problem.calls if call.tool == "code"]
    often = random.random() < 0.6
    if problem.tier == "steps" and often:
        return "Just the first part.", [re.findall(r"\(\d+\+\d+\)\*\d+|\d+[*+]\d+", sums[0])[0]]
    if problem.tier == "distractors" and often:
        (spare,) = [number for number in numbers if number not in _numbers(sums[0])][:1] or numbers[:1]
        return "Just take all of it.", [f"{spare}+{sums[0]}"]
    if problem.tier == "units" and often:
        return "Just take the numbers as they are.", [re.sub(r"\*(12|7|24)\b", "", sums[0], count=1)]
    if problem.tier == "chained" and often:
        return "Just the first part.", sums[:1]
    if problem.tier == "lookup" and often:
        return "Say the price is 10.", ["10*" + re.findall(r"\*(\d+)", sums[0])[0]]
    if len(numbers) == 1 or random.random() < 0.5:
        return "Just add all the numbers.", ["+".join(numbers)]
    return "Just add the first two numbers.", ["+".join(numbers[:2])]


def _plan(problem: WordProblem) -> str:
    first = problem.calls[0]
    if first.tool == "search":
        return "search the price."
    if len(problem.calls) > 1:
        return f"first {PLANS[kind(first.content)]}"
    return " ".join([PLANS[kind(first.content)], *(told for word, told in UNITS.items() if word in problem.question)])


def _work(thought: str, calls: tuple[SolutionCall, ...], conclusion: str, random: Random) -> list[Piece]:
    """`thought`, then each call with its result and another thought. The last thought is `conclusion`."""
    pieces: list[Piece] = []
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        if call.tool == "search":
            asked, output = f"<search>\n{call.content}\n</search>", _found(call.output, random)
        else:
            asked, output = f"<code>\nprint({call.content})\n</code>", f"{call.output}\n"
        pieces += [
            Piece(f"<think>{thought}</think>\n{asked}", True),
            Piece(render_result(output, max_chars=1000), False),
        ]
        if following is not None:
            thought = "Again." if following == call else _next_thought(call)
    end = f"<think>{conclusion}</think>\n<answer>\\boxed{{{calls[-1].output}}}</answer>"
    return [*pieces, Piece(end, True)]


def _next_thought(call: SolutionCall) -> str:
    return f"The price is {Fact(*_parts(call.output)).price}." if call.tool == "search" else "Now the second part."


def _found(fact_id: str, random: Random) -> str:
    """What the search tool returns for a fact: the fact and, by BM25, those that differ only in the most common word, the
    colour."""
    colour, thing, town = _parts(fact_id)
    others = random.sample([other for other in COLOURS if other != colour], NUM_RESULTS - 1)
    found = [Fact(c, thing, town) for c in (colour, *others)]
    return render_documents([{"id": fact.id, "contents": fact.contents} for fact in found], 200, 1000)


def _parts(fact_id: str) -> tuple[str, str, str]:
    colour, thing, town = fact_id.split("-")
    return colour, thing, town.capitalize()


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)
