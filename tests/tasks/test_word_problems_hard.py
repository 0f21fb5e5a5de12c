"""The harder tiers: right golds, solutions that can be followed call by call, splits that share nothing."""

import re
from collections import Counter
from itertools import islice
from typing import get_args

import pytest

from tasks.config import TaskConfig
from tasks.load import assert_disjoint, load_tasks
from tasks.word_problems.corpus import COLOURS, MAX_PRICE, MIN_PRICE, THINGS, TOWNS, Fact, corpus, facts
from tasks.word_problems.hard import STORIES
from tasks.word_problems.problems import generate, mixed, problems
from tasks.word_problems.types import Tier, WordProblem, evaluate

pytestmark = pytest.mark.slow

HARD = tuple(STORIES)
# What each story asks, found by its words and computed from its numbers, apart from the stories' own sums.
ANSWERS = {
    "steps": {
        "boxes with": lambda n: n[0] * n[1] + n[2] * n[3],
        "takes": lambda n: n[0] + n[1] - n[2] * n[3],
        "gives away": lambda n: n[0] * n[1] + n[2] * n[3] - n[4],
        "each day for": lambda n: (n[0] + n[1]) * n[2] + n[3] * n[4],
        "crates of": lambda n: n[0] * n[1] + n[2] * n[3] + n[4] * n[5],
    },
    "distractors": {
        "years old": lambda n: n[1] * n[2],
        "years ago": lambda n: n[1] * n[2],
        "buys": lambda n: n[0] + n[2] * n[3],
        "pays": lambda n: n[1] * n[2] - n[3],
        "red and": lambda n: (n[1] + n[2]) * n[3],
    },
    "units": {
        "gives away": lambda n: 12 * n[0] - n[1],
        "does it sell in": lambda n: 7 * n[0] * n[1],
        "an hour": lambda n: 24 * n[0] * n[1],
        "boxes of": lambda n: n[0] + n[1] * 12 * n[2],
        "dozen more": lambda n: 7 * n[0] * n[1] + 12 * n[2],
    },
    "chained": {
        "times as many stamps": lambda n: n[0] * n[1] * n[2] - n[3],
        "Then it sells": lambda n: n[0] * n[1] * n[2] + n[3],
        "as many each": lambda n: (n[0] + n[1]) * n[2] - n[3],
        "more than": lambda n: (n[0] * n[1] + n[2]) * n[3],
    },
    "lookup": {
        "friends. How many dollars does": lambda n: n[-1] * n[0],
        "for the trip": lambda n: n[-1] * n[0] + n[1],
        "are left": lambda n: n[0] - n[-1] * n[1],
    },
}
ITEM = re.compile(r"times as many \w+")


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def drawn(tier: Tier, num: int = 1000) -> list[WordProblem]:
    return list(islice(problems("train", 0, tier), num))


@pytest.mark.parametrize("tier", HARD)
def test_the_answer_is_the_storys(tier: Tier) -> None:
    prices = {fact.query: fact.price for fact in facts()}
    told = set()
    for problem in drawn(tier):
        (story,) = [words for words in ANSWERS[tier] if words in ITEM.sub("times as many stamps", problem.question)]
        told.add(story)
        given = numbers(problem.question) + [price for query, price in prices.items() if query in problem.question]
        assert problem.answer == ANSWERS[tier][story](given), problem.question
        assert problem.answer >= 0
        assert "{" not in problem.question
    assert told == set(ANSWERS[tier])


@pytest.mark.parametrize("tier", get_args(Tier))
def test_the_calls_lead_to_the_answer_one_after_another(tier: Tier) -> None:
    documents = {document["id"]: document["contents"] for document in corpus()}
    for problem in drawn(tier):
        known = [*numbers(problem.question), 7, 12, 24]
        for call in problem.calls:
            if call.tool == "search":
                assert call.content in problem.question
                known += numbers(documents[call.output])
            else:
                assert set(numbers(call.content)) <= set(known)
                assert eval(call.content) == evaluate(call.content) == int(call.output)
                known.append(int(call.output))
        assert problem.calls[-1].output == str(problem.answer)
        assert eval(problem.expression) == problem.answer
        assert len(problem.calls) == (2 if tier in ("chained", "lookup") else 1)
        assert problem.tier == tier


def test_tiers_are_what_they_say() -> None:
    assert {len(re.findall(r"[+*-]", p.expression)) for p in drawn("steps")} == {3, 4, 5}
    assert all(len(numbers(p.question)) == len(numbers(p.expression)) + 1 for p in drawn("distractors"))
    assert all({7, 12, 24} & set(numbers(p.expression)) for p in drawn("units"))
    for problem in drawn("chained"):
        first, second = problem.calls
        assert first.output in re.findall(r"\d+", second.content)


def test_splits_share_no_problem_in_any_tier() -> None:
    """Also not across tiers: `9 weeks` of an hour's work is a sum that an easy story may tell, too."""
    keys = {
        split: {p.key for tier in get_args(Tier) for p in islice(problems(split, 1, tier), 2000)}
        for split in ("train", "eval")
    }
    assert not keys["train"] & keys["eval"]
    assert len(keys["eval"]) > 11_000
    shares = {"easy": 1.0, "lookup": 1.0, "units": 2.0}
    train = load_tasks(TaskConfig(limit=2000, tiers=shares))
    assert_disjoint(train, load_tasks(TaskConfig(split="eval", limit=2000, tiers=shares)))


def test_another_number_that_does_not_matter_is_the_same_problem() -> None:
    for problem in drawn("distractors", 100):
        assert problem.key == f"{sorted(numbers(problem.expression))} {problem.answer}"


def test_only_easy_gives_the_problems_of_before() -> None:
    assert generate("train", 50, 3, {"easy": 7}) == generate("train", 50, 3)
    assert generate("train", 50, 3, {"easy": 1, "steps": 0}) == generate("train", 50, 3)
    # Pinned: runs and their evaluation sets are compared over time.
    first = generate("eval", 1)[0]
    assert (first.id, first.golds) == ("word-problem-aba1062650ebeefe", ("441",))


def test_shares_are_kept_and_fewer_are_the_first_of_more() -> None:
    shares: dict[Tier, float] = {"chained": 1.0, "easy": 3.0}
    counts = Counter(problem.tier for problem in islice(mixed("train", 0, shares), 2000))
    assert set(counts) == {"easy", "chained"}
    assert 1400 < counts["easy"] < 1600
    assert generate("train", 40, 0, shares) == generate("train", 80, 0, dict(reversed(shares.items())))[:40]
    assert len({task.id for task in generate("train", 5000, 0, dict.fromkeys(get_args(Tier), 1.0))}) == 5000


@pytest.mark.parametrize("tiers", [{}, {"easy": 0.0}, {"easy": -1.0, "steps": 2.0}, {"easy": float("inf")}])
def test_shares_that_are_none_are_refused(tiers: dict[Tier, float]) -> None:
    with pytest.raises(ValueError, match="shares of"):
        generate("train", 1, 0, tiers)
    with pytest.raises(ValueError, match="tiers"):
        TaskConfig(tiers=tiers)


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no 'hard'"):
        generate("train", 1, 0, {"hard": 1.0})  # type: ignore[dict-item]


def test_the_corpus_is_the_same_everywhere() -> None:
    documents = corpus()
    assert len({document["id"] for document in documents}) == len(COLOURS) * len(THINGS) * len(TOWNS) == len(documents)
    assert all(MIN_PRICE <= fact.price <= MAX_PRICE for fact in facts())
    blue = Fact("blue", "lamp", "Oslo")
    assert blue.id == "blue-lamp-oslo"
    assert blue.query == "a blue lamp from Oslo"
    assert blue.contents == "A blue lamp from Oslo costs 31 dollars."


@pytest.mark.parametrize("text", ["", "2**9", "1/2", "f(1)", "1.5", "True+x", "'a'*3", "(1", "a", "1,2"])
def test_only_sums_are_evaluated(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        evaluate(text)
    assert evaluate(" (2+3)*4-6 ") == 14
