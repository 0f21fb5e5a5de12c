"""Word problems: right golds, no problem in both splits, the same everywhere."""

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from tasks.word_problems.problems import MAX_NUM, TEMPLATES, WordProblem, draw, generate, problems

ROOT = Path(__file__).resolve().parents[2]

# What each story asks, found by its words and computed from its numbers, apart from the templates' own arithmetic.
STORIES = {
    "fills": lambda n: n[0] * n[1],
    "shop sells": lambda n: n[0] * n[1],
    "bags of": lambda n: n[0] + n[1] * n[2],
    "then finds": lambda n: n[0] * n[1] + n[2],
    "gives away": lambda n: n[0] * n[1] - n[2],
    "takes": lambda n: n[0] - n[1] * n[2],
    "red and": lambda n: (n[0] + n[1]) * n[2],
    "A hall": lambda n: n[0] * n[1] * n[2],
}


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def test_the_gold_is_the_storys_answer() -> None:
    told = set()
    for task in generate("train", 2000) + generate("eval", 500):
        (story,) = [words for words in STORIES if words in task.question]
        told.add(story)
        assert task.golds == (str(STORIES[story](numbers(task.question))),), task.question
        assert int(task.golds[0]) > 0
        assert "{" not in task.question
    assert told == set(STORIES)
    assert len(STORIES) == len(TEMPLATES)


def test_a_story_by_hand() -> None:
    stamps = TEMPLATES[2]
    assert stamps.expression.format(a=631, b=98, c=4) == "631+98*4"
    assert stamps.value(631, 98, 4) == 1023


def test_the_expression_gives_the_answer_and_has_the_storys_numbers_in_order() -> None:
    for problem in islice(problems("train"), 2000):
        assert eval(problem.expression) == problem.answer
        assert numbers(problem.expression) == numbers(problem.question)
        assert "*" in problem.expression
        assert max(numbers(problem.question)) >= 100


def test_ids_and_questions_are_unique_within_a_split() -> None:
    tasks = generate("train", 20_000)
    assert len({t.id for t in tasks}) == len({t.question for t in tasks}) == 20_000


def test_splits_share_no_problem_even_when_retold() -> None:
    """By numbers and answer, over many seeds: a name, a story or an order of numbers doesn't make another problem."""

    def keys(split: str) -> set[tuple[tuple[int, ...], str]]:
        tasks = [t for seed in range(5) for t in generate(split, 4000, seed)]
        return {(tuple(sorted(numbers(t.question))), t.golds[0]) for t in tasks}

    train, evaluation = keys("train"), keys("eval")
    assert len(train) > 15_000
    assert len(evaluation) > 15_000
    assert not train & evaluation


def test_the_split_hangs_on_the_arithmetic_alone() -> None:
    bags = WordProblem(question="98 bags of 4", expression="631+98*4", answer=1023, key="[4, 98, 631] 1023")
    retold = WordProblem(question="4 bags of 98", expression="631+4*98", answer=1023, key="[4, 98, 631] 1023")
    assert bags.split == retold.split
    random = Random(0)
    drawn = [draw(random) for _ in range(5000)]
    assert all(p.key == f"{sorted(numbers(p.question))} {p.answer}" for p in drawn)
    share = sum(p.split == "eval" for p in drawn) / len(drawn)
    assert 0.08 < share < 0.12


def test_fewer_are_the_first_of_more_and_seeds_differ() -> None:
    assert generate("train", 50) == generate("train", 200)[:50]
    assert not {t.id for t in generate("eval", 100, seed=1)} & {t.id for t in generate("eval", 100, seed=2)}


def test_every_process_gets_the_same() -> None:
    """Python's own `hash` differs between processes; ids that used it would break a resumed ledger."""
    code = "from tasks.word_problems.problems import generate\nprint([t.id for t in generate('eval', 20, 7)])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{[t.id for t in generate('eval', 20, 7)]}\n"}


def test_a_request_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(ValueError, match="test"):
        generate("test", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="20000"):
        generate("eval", MAX_NUM["eval"] + 1)
    with pytest.raises(ValueError, match="-1"):
        generate("train", -1)
