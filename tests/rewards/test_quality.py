"""Quality by hand, against a second writing of the formulas on 10,000 generated trajectories, and the split."""

import math
import random
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rewards import dimensions, quality
from rewards.config import QualityConfig
from rewards.quality import Candidate, Quality
from trajectory.types import Task, ToolCall, ToolResult, Trajectory, Turn

TASK = Task(id="q", question="Leo has 12 red stamps. How many?", golds=("5",))


def make_trajectory(text, results=(), task_id="q"):
    """A trajectory whose tools gave `results`; None is a call whose result never came."""
    call = ToolCall(tool="python", content="x")
    empty = np.zeros(0, np.int32)
    return Trajectory(
        task_id=task_id,
        index=0,
        prompt_ids=empty,
        response_ids=empty,
        loss_mask=np.zeros(0, np.bool_),
        logprobs=np.zeros(0, np.float32),
        segments=(),
        turns=tuple(Turn(text="", start=0, end=0, result_end=0, tool_call=call, tool_result=r) for r in results),
        text=text,
        finish_reason="answer",
    )


def answered(answer, results=()):
    return make_trajectory(f"<think>a</think><answer>It is \\boxed{{{answer}}}.</answer>", results)


# --- by hand ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>I add them.</think>", 1.0),
        ("<think>Maybe I add.</think>", 0.0),
        ("<think>a</think><code>1</code><think>It is LIKELY, so</think>", 0.0),
        ("<think>unlikely seem mightily guessed</think>", 1.0),  # no whole word
        ("<think>recheck</think>", 0.0),
        ("<think>(perhaps)</think>", 0.0),
        ("<think>a</think> maybe <answer>probably</answer>", 1.0),  # outside
        ("<code># maybe</code><think>a</think>", 1.0),
        ("maybe</think>", 1.0),
        ("<think>maybe", 1.0),  # not closed: no block
        ("<think>a <think>might</think> b</think>", 0.0),
        ("<think>a <think>b</think> might</think>", 1.0),
        ("", 1.0),
    ],
)
def test_confidence(text, expected):
    assert dimensions.confidence(text) == expected


@pytest.mark.parametrize(
    ("num_words", "ideal", "expected"),
    [
        (50, 50, 1.0),
        (75, 50, math.exp(-0.5)),  # one deviation, which is half of the ideal
        (100, 50, math.exp(-2)),
        (0, 50, math.exp(-2)),
        (50, 0, 1.0),
        (50, -1, 1.0),
        (10**12, 1, 0.0),
    ],
)
def test_length(num_words, ideal, expected):
    assert dimensions.length(num_words, ideal) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a a a a a", 1.0),  # under 6 words
        ("a b c d e f", 1.0),
        ("a a a a a a", 0.0),  # 4 of 4
        ("a b c a b c", 0.5),  # abc twice of 4: bca, cab once
        ("a b c x a b c y", 1 - 2 / 6),
        ("", 1.0),
    ],
)
def test_repetition(text, expected):
    assert dimensions.repetition(text.split()) == pytest.approx(expected)


def paper_score(text, ideal):
    return quality.assess(make_trajectory(text), TASK, ideal, QualityConfig()).score


def test_score():
    text = "<think>maybe a</think> b c d e f"  # 7 words
    assert paper_score(text, 7) == 0.6
    assert paper_score(text.replace("maybe", "just"), 7) == 1.0
    assert paper_score("a b c a b c", 4) == round(0.4 + 0.3 * math.exp(-0.5) + 0.15, 4) == 0.732


# --- against a second writing -------------------------------------------------------------------------------------------

PLAIN = "the number of stamps is 12 times 3 so I add and multiply them then print it"
DOUBTS = "maybe Perhaps unsure guess seems probably might likely recheck unlikely guessing maybe, (might)"
TAGS = "<think> </think> <code> </code> <search> </search> <result> </result> <answer> </answer> <THINK> </Think>"
PIECES = [*PLAIN.split(), *DOUBTS.split(), *TAGS.split(), "\n", "\t", "İ", "\\boxed{36}"]
CALL = "\n<code>\nprint(3)\n</code>\n<result>\n3\n</result>\n"


def generated(random_):
    """Half well-formed, half rubble; repeated runs of words are common."""
    words = random_.choices(
        PIECES[: len(PLAIN.split()) + 10 if random_.random() < 0.7 else len(PIECES)], k=random_.randrange(0, 90)
    )
    if words and random_.random() < 0.4:
        start = random_.randrange(len(words))
        words += words[start : start + random_.randrange(1, 12)] * random_.randrange(1, 4)
    body = random_.choice([" ", "  ", "\n", ""]).join(words)
    if random_.random() < 0.5:
        body = f"<think>{body}</think>{CALL}<think>so 3</think><answer>3</answer>"
    return body


def reference(text, ideal):
    """(confidence, length, repetition, score), straight from the formulas."""
    doubts = ["maybe", "unsure", "guess", "seems", "perhaps", "probably", "might", "likely", "recheck"]
    thoughts = re.findall(r"<think>(.*?)</think>", text, re.DOTALL | re.IGNORECASE)
    c = 0.0 if any(word in doubts for t in thoughts for word in re.split(r"\W+", t.lower())) else 1.0
    words = text.split()
    n = len(words)
    l = 1.0 if ideal <= 0 else math.e ** -(((n - ideal) ** 2) / (2 * (ideal / 2) ** 2))  # noqa: E741
    e = 1.0
    if n >= 6:
        trigrams = [" ".join(words[i : i + 3]) for i in range(n - 2)]
        e = 1 - sum(trigrams.count(t) > 1 for t in trigrams) / len(trigrams)
    return c, l, e, round(0.4 * c + 0.3 * l + 0.3 * e, 4)


def test_equals_the_formulas_on_10_000_trajectories():
    random_ = random.Random(3)
    config = QualityConfig()
    seen = set()
    for _ in range(10_000):
        text, ideal = generated(random_), random_.randrange(-1, 120)
        c, l, e, total = reference(text, ideal)  # noqa: E741
        found = quality.assess(make_trajectory(text), TASK, ideal, config)
        assert found.dimensions == {"confidence": c, "length": pytest.approx(l), "repetition": pytest.approx(e)}, text
        # A sum on the edge between two fourth places may be rounded to either.
        assert found.score == pytest.approx(total, abs=1.0001e-4 if found.score != total else 0), text
        assert (found.num_words, found.ideal_num_words) == (len(text.split()), ideal)
        seen.add((c, e == 1, l == 1))
    assert len(seen) == 8, "every combination was met"


@given(st.text(alphabet="ab <>/thinkmaybe\n", max_size=300), st.integers(-5, 500))
def test_any_text_scores_between_0_and_1(text, ideal):
    found = quality.assess(make_trajectory(text), TASK, ideal, ALL)
    assert all(0 <= value <= 1 for value in found.dimensions.values())
    assert 0 <= found.score <= 1


@pytest.mark.parametrize(
    "text", ["<think>maybe" * 100_000, "a " * 500_000, "maybe" * 200_000, "<think>\\boxed{" * 60_000]
)
def test_hostile_text_takes_linear_time(text):
    started = time.monotonic()
    quality.assess(make_trajectory(text), TASK, 60, ALL)
    assert time.monotonic() - started < 5


# --- what the text can't show -------------------------------------------------------------------------------------------

OK = ToolResult(status="ok", output="36\n")


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ((), 1.0),
        ((OK,), 1.0),
        ((OK, ToolResult(status="error", output="NameError")), 0.5),
        ((ToolResult(status="timeout"), ToolResult(status="unavailable"), OK, None), 0.25),
    ],
)
def test_tool_success(results, expected):
    assert dimensions.tool_success(answered("36", results)) == expected


@pytest.mark.parametrize(
    ("answer", "output", "expected"),
    [
        ("36", "36\n", 1.0),
        ("36.0", "36", 1.0),
        ("1,250", "total: 1250", 1.0),
        ("37", "36", 0.0),
        ("3", "36", 0.0),  # a digit of another number is not it
        ("12", "", 1.0),  # from the question
        ("\\frac{1}{36}", "1/36", 1.0),  # \frac is no part
        ("Frank Lowy", "[1] Sir frank lowy was born", 1.0),
        ("Frank Lowy", "[1] Frank Zappa", 0.5),
        ("36 red", "36", 1.0),
        ("\\emptyset", "36", 0.0),
    ],
)
def test_grounding(answer, output, expected):
    assert dimensions.grounding(answered(answer, (ToolResult(status="ok", output=output),)), TASK) == expected


def test_grounding_without_an_answer():
    assert dimensions.grounding(make_trajectory("<think>36</think>", (OK,)), TASK) == 0.0


ALL = QualityConfig(
    weights={"confidence": 0.2, "length": 0.2, "repetition": 0.2, "tool_success": 0.2, "grounding": 0.2}
)


def test_all_dimensions_weighted():
    found = quality.assess(answered("36", (OK, ToolResult(status="error"))), TASK, 0, ALL)
    assert found.dimensions == {"confidence": 1, "length": 1, "repetition": 1, "tool_success": 0.5, "grounding": 1}
    assert found.score == 0.9


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"confidence": 0.5, "beauty": 0.5}, "weights names 'beauty'; the dimensions are confidence, length"),
        ({"confidence": 0.5}, "add up to 0.5, not 1"),
        ({"confidence": 1.5, "length": -0.5}, "weights.length\n.*greater than or equal to 0"),
    ],
)
def test_weights_that_make_no_score_are_refused(weights, message):
    with pytest.raises(ValidationError, match=message):
        QualityConfig(weights=weights)


# --- the split ----------------------------------------------------------------------------------------------------------


def candidates(*scores, wrong=()):
    return [Candidate(i, i not in wrong, Quality(s, {}, 10, 10)) for i, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "wrong", "kept"),
    [
        ((0.90, 0.95, 0.90), (), (0, 1, 2)),
        ((0.8999, 0.95, 0.90), (), (1,)),
        ((0.86, 0.50), (), (0,)),
        ((0.8599, 0.50), (), ()),
        ((0.88, 0.89, 0.89), (), (1,)),  # the first of equal ones
        ((1.0, 1.0), (1,), (0,)),
        ((0.87, 1.0), (1,), (0,)),  # the wrong one isn't the best
        ((0.95, 0.2, 0.91), (1,), (0, 2)),  # nor one of "every candidate"
        ((1.0, 1.0), (0, 1), ()),
        ((), (), ()),
    ],
)
def test_split(scores, wrong, kept):
    found = quality.split(candidates(*scores, wrong=wrong), QualityConfig())
    assert found.kept == kept
    assert found.to_repair == tuple(i for i in range(len(scores)) if i not in kept)


def test_split_speaks_of_the_candidates_own_indices():
    some = [Candidate(7, True, Quality(0.9, {}, 1, 1)), Candidate(3, False, Quality(0.9, {}, 1, 1))]
    assert quality.split(some, QualityConfig()) == quality.Split(kept=(7,), to_repair=(3,))


def test_thresholds_are_configuration():
    config = QualityConfig(keep_all_from=0.5, keep_best_from=0.4)
    assert quality.split(candidates(0.6, 0.5), config).kept == (0, 1)
    assert quality.split(candidates(0.4, 0.3), config).kept == (0,)


def test_ideal_length():
    assert quality.ideal_length(["a b c", "a b", "a b c d"]) == 2
    assert quality.ideal_length([]) == 0
