"""Answers against golds: hand-computed, and without math-verify wherever numbers are plain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import outcome, verifier
from rewards.verifier import Verdict
from trajectory.types import Task


@pytest.fixture
def no_verifier(monkeypatch):
    def unexpected(answer, gold, timeout_s):
        raise AssertionError(f"math-verify was asked about {answer!r} and {gold!r}")

    monkeypatch.setattr(verifier, "equal", unexpected)


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("72", "72", True),
        ("72.0", "72", True),
        ("72.", "72", True),
        ("72.001", "72", False),
        ("72.0000005", "72", True),
        ("1,234", "1234", True),
        ("1{,}234", "1234", True),
        ("-5", "5", False),
        ("\\$18", "18", True),
        ("50\\%", "50", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\dfrac12", "1/2", True),
        ("-\\frac{1}{2}", "-0.5", True),
        ("\\frac{-1}{2}", "-0.5", True),
        ("1/3", "0.333", False),
        ("1e3", "1000", True),
        (".5", "0.5", True),
        ("5\\text{ cm}", "5", True),
        ("\\text{A}", "A", True),
        ("x = 5", "5", True),
        ("90^\\circ", "90", True),
        ("\\{2, 1\\}", "\\{1,2\\}", True),
        ("2, 1", "1, 2", True),
        ("1, 2", "1, 2, 3", False),
        ("\\left(1, 2\\right)", "(1,2)", True),
        ("9" * 40, "1", False),
    ],
)
@pytest.mark.usefixtures("no_verifier")
def test_plain_answers_need_no_math_verify(answer, gold, equal):
    assert outcome.math_equal(answer, gold, 1.0) == Verdict(equal)


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(2,1)", "(1,2)", False),
        ("[0,1)", "(0,1)", False),
        ("50\\%", "\\frac{1}{2}", True),
        ("\\pi", "\\pi+1", False),
        ("1 1/2", "5.5", False),
    ],
)
def test_other_answers_are_left_to_math_verify(answer, gold, equal):
    assert outcome.math_equal(answer, gold, 30.0).equal is equal


@given(st.text(alphabet="0123456789.,-+/eE%${}\\ frac", max_size=30), st.integers())
def test_any_text_is_cleaned_and_read_without_an_error(text, number):
    outcome._values(outcome.clean_latex(text))
    assert outcome._values(outcome.clean_latex(f"{number:,}")) == [number]


@pytest.mark.parametrize(
    ("answer", "gold", "f1"),
    [
        ("Frank Lowy", "frank lowy", 1.0),
        ("the Frank Lowy!", "Frank Lowy", 1.0),
        ("Sir Frank Lowy", "Frank Lowy", 0.8),  # precision 2/3, recall 1
        ("Lowy", "Frank Lowy", 2 / 3),
        ("a b b", "b b c", 0.8),  # "a" is an article: 2 of 2 words, 2 of 3
        ("Paris", "London", 0.0),
        ("yes", "Yes.", 1.0),
        ("yes it is", "yes", 0.0),
        ("no", "yes", 0.0),
        ("noanswer", "no answer", 0.0),
        ("", "Paris", 0.0),
        ("\\text{Lisbon}", "Lisbon", 1.0),
        ("\\boxed{\\text{Lisbon}}", "Lisbon", 1.0),
        ("\\mathrm{New York}", "New York", 1.0),
        ("\\textbf{No}", "no", 1.0),
        ("\\text{\\emph{The} Hague}", "the Hague", 1.0),
        ("1914-18", "1914–18", 1.0),
        ("Franco-German", "Franco‑German", 1.0),
        ("Nin\u0303o", "Niño", 1.0),
        ("Kenya’s “lion”", 'Kenya\'s "lion"', 1.0),
        ("《東京》。", "東京", 1.0),
        ("Ｒ２Ｄ２", "r2d2", 1.0),
        ("Zürich", "Zurich", 0.0),  # another letter, not another typography
    ],
)
def test_qa_f1(answer, gold, f1):
    assert outcome.qa_f1(answer, gold) == pytest.approx(f1)


def test_score_takes_the_best_gold():
    qa = Task(id="q", question="?", golds=("Frank Lowy", "Lowy"), kind="qa")
    assert outcome.score("lowy", qa, 1.0) == outcome.Outcome(1.0, True)
    assert outcome.score("Frank X Y Z", qa, 1.0).value == pytest.approx(1 / 3)
    assert not outcome.score("Frank X Y Z", qa, 1.0).correct
    math = Task(id="m", question="?", golds=("1", "2"))
    assert outcome.score("2", math, 1.0) == outcome.Outcome(1.0, True)
    assert outcome.score("3", math, 1.0) == outcome.Outcome(0.0, False)
    assert outcome.score(None, math, 1.0) == outcome.Outcome(0.0, False)


def test_a_failed_comparison_is_noted(monkeypatch):
    monkeypatch.setattr(verifier, "equal", lambda answer, gold, timeout_s: Verdict(False, f"{gold} took too long"))
    math = Task(id="m", question="?", golds=("\\pi", "\\tau"))
    assert outcome.score("\\sqrt{2}", math, 1.0) == outcome.Outcome(0.0, False, "\\pi took too long")
    assert outcome.score("\\tau", math, 1.0) == outcome.Outcome(1.0, True)
