"""Two spellings of one question share a key; two questions never do."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.load import assert_disjoint
from tasks.question_key import question_key
from trajectory.types import Task


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("Mira’s hens lay 12 eggs", "Mira's hens lay 12 eggs."),
        ("“Seven” is prime", '"Seven" is prime'),
        ("Where is Forlì?", unicodedata.normalize("NFD", "Where is Forlì?")),
        ("How many？", "How many?"),
        ("Ｘ＋１", "x+1"),
        ("Let \\[x=1\\] where x", "Let \\[x=1\\]where x"),
        ("Find $\\dfrac{1}{2}$", "find \\(\\frac12\\)"),
        ("Find $\\left( 1,\\, 2 \\right)$", "Find $(1,2)$"),
        ("$x^{2}$", "x²"),
        ("$\\text{lcm}(4,6)$", "lcm(4,6)"),
        ("$\\mathrm{cos}(x)$", "$\\cos(x)$"),
        ("$\\operatorname{gcd}(8,6)$", "gcd(8,6)"),
        ("$\\max(8,6)$", "max(8,6)"),
        ("$30^{\\circ}$", "30°"),
        ("a ≤ b", "$a \\leq b$"),
        ("3 × 4", "$3\\times4$"),
        ("1, 2, …, n", "$1, 2, \\ldots, n$"),
        ("it costs 1,200 yen", "it costs 1200 yen"),
        ("it costs 1{,}200 yen", "it costs 1,\\!200 yen"),
        ("a 10-foot pole", "a 10 foot pole"),
        ("a well–known rule", "a well-known rule"),
        ("Tom — who is old — left", "Tom, who is old, left"),
        ("the x-axis", "the x axis"),
        ("pages 3–5", "pages 3-5"),
        ("soft\u00adware\u200b", "Software"),
        ("What\u00a0is\u20092+3?", "what is 2+3"),
    ],
)  # fmt: skip
def test_typography_makes_no_other_question(question, other):
    assert question_key(question) == question_key(other)


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("Compute $\\arccos 1.$", "Compute $\\arccos (-1).$"),
        ("What is 2.5 times 6?", "What is 25 times 6?"),
        ("Evaluate $14*3$.", "Evaluate $14+3$."),
        ("Evaluate $14-3$.", "Evaluate $14/3$."),
        ("3 - 4", "3 4"),
        ("x-y", "x y"),
        ("$\\sin x - \\sin y$", "$\\sin x \\sin y$"),
        ("sin x - cos x", "sin x cos x"),
        ("(1+2)*3", "1+2*3"),
        ("5!", "5"),
        ("What is n!", "What is n"),
        ("f'(x)", "f(x)"),
        ("5%", "5"),
        ("90°", "90"),
        ("a<b", "a>b"),
        ("a ≤ b", "a < b"),
        ("±5", "5"),
        ("x²", "x2"),
        ("½", "12"),
        (".5", "5"),
        ("1,5", "1.5"),
        ("a ratio of 3:5", "a ratio of 3 5"),
        ("$2^{12}$", "$2^1 2$"),
        ("$x^{2y}$", "$x^2y$"),
        ("$\\frac{1}{23}$", "$\\frac{12}{3}$"),
        ("$[0,1)$", "$(0,1)$"),
        ("$\\Gamma(3)$", "$\\gamma(3)$"),
        ("$a_1$", "$a^1$"),
        ("$\\overline{AB}$", "$AB$"),
        ("$\\sqrt{2}$", "$2$"),
        ("$|x|$", "$x$"),
        ("u \\times v", "u \\cdot v"),
        ("$\\mathbb{R}$", "$R$"),
    ],
)
def test_another_number_or_operator_is_another_question(question, other):
    assert question_key(question) != question_key(other)


QUESTION = "Tom has {} bags of {} apples. Find ${}{}{}$ of them."
SIGN = st.sampled_from(["+", "-", "*", "/", "^", "=", "<", ">", "\\cdot", "\\div", "\\le", "!", ":", "%"])
NUMBER = st.one_of(st.integers(0, 10**7).map(str), st.integers(-99, -1).map(str), st.decimals(0, 99, places=2).map(str))


@given(st.tuples(NUMBER, NUMBER, NUMBER, SIGN, NUMBER), st.tuples(NUMBER, NUMBER, NUMBER, SIGN, NUMBER))
def test_keys_are_equal_exactly_if_numbers_and_operator_are(one, other):
    assert (question_key(QUESTION.format(*one)) == question_key(QUESTION.format(*other))) == (one == other)


@given(st.text(st.characters(exclude_characters="\\"), max_size=200))  # a backslash makes a command of a space
def test_any_text_has_a_key_that_ignores_case_form_and_space(text):
    key = question_key(text)
    assert question_key(unicodedata.normalize("NFD", text)) == key
    assert question_key("\n" + re.sub(" ", "  ", text) + " ") == key


def test_a_question_of_both_sets_is_found_in_another_typography():
    train = [Task(id="t", question="Is Nina’s \\dfrac12 larger?", golds=("yes",))]
    with pytest.raises(ValueError, match="1 training tasks are in the evaluation set"):
        assert_disjoint(train, [Task(id="e", question="is Nina's $\\frac{1}{2}$ larger", golds=("yes",))])
    assert_disjoint(train, [Task(id="e", question="Is Nina’s \\dfrac13 larger?", golds=("yes",))])
