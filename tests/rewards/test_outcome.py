"""Answers against golds: hand-computed, and without math-verify wherever numbers are plain."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import math_text, outcome, verifier
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


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        # A font keeps what it holds.
        ("(\\mathrm{C})", "(\\mathrm{D})", False),
        ("(\\text{C})", "(\\text{C})", True),
        ("{\\text{(C)}}", "\\text{(C)}", True),
        ("\\{\\text{green}\\}", "\\{\\text{white}\\}", False),
        ("\\text{no}", "\\text{on}", False),  # as letters to multiply they are equal
        ("\\text{Yes}", "yes", True),
        ("-\\mathbf{3}", "-\\mathbf{4}", False),
        ("5\\mathbf{i}", "5\\mathbf{j}", False),
        ("7+2\\mathrm{i}", "7+2", False),
        ("7+2\\mathrm{i}", "7+2i", True),
        ("\\mathrm{gcd}(9,6)", "\\mathrm{lcm}(9,6)", False),
        ("n\\text{ is even}", "n\\text{ is odd}", False),
        ("3\\text{ a.m.}", "3\\text{ p.m.}", False),
        ("3\\text{ million}", "3", False),
        # A unit behind a number goes, also in the middle of nothing else.
        ("{25\\text{ miles}}", "25\\text{ miles}", True),
        ("12\\mbox{ cm}^2", "12 cm^2", True),
        ("12 m²", "12", True),
        ("\\frac{7}{2}\\text{ cm}", "3.5", True),
        ("1\\text{ hour }45\\text{ minutes}", "145", False),
        # Lists are without order, tuples aren't, and a space tells a list from a thousand.
        ("123, 456", "456, 123", True),
        ("123, 456", "\\{456, 123\\}", True),
        ("123456", "123, 456", False),
        ("123456", "123,456", True),
        ("110, 220, 330", "110220330", False),
        ("4 \\text{ and } 9", "9, 4", True),
        ("4 \\text{ and } 9", "49", False),
        ("x = 1 or x = -1", "-1, 1", True),
        ("(4,9)", "(9,4)", False),
        ("(x, y) = (4, 9) \\quad \\text{and} \\quad (9, 4)", "(9, 4), (4, 9)", True),
        ("\\sqrt{3}, -\\sqrt{3}", "-\\sqrt{3}, \\sqrt{3}", True),
        ("(1,\\pi), (2,\\pi)", "(2,\\pi), (1,\\pi)", True),
        ("0,125", "0.125", True),
        ("{(3,4)}", "(3,4)", True),
        ("{3,\\!500}", "3500", True),
        # Every value that an equation claims must be right.
        ("4=7", "7", False),
        ("3+4=7", "7", True),
        ("3\\pi=7", "7", False),
        ("S=ab=7", "7", True),
        ("y=-\\frac{x}{2}+3", "x+2y=6", True),
        # Ways to write a number.
        ("45°", "45^\\circ", True),
        ("45^{\\circ}", "45", True),
        ("2 1/4", "2.25", True),
        ("-2\\frac14", "-9/4", True),
        ("2½", "5/2", True),
        ("6.6e-34", "6.6\\times10^{-34}", True),
        ("6.6e-34", "6.7\\times 10^{-34}", False),
        ("6.6e-34", "0", False),
        ("−5", "-5", True),
        ("€7.50", "7.5", True),
        ("So the result is $\\boxed{\\frac{7}{2}}$.", "3.5", True),
        ("\\boxed{7} or \\boxed{8}", "8", False),
        # Words behind both numbers that differ, and a sentence around one formula.
        ("8\\text{ is even}", "8\\text{ is odd}", False),
        ("4\\text{C}", "4\\text{D}", False),
        ("8\\text{ apples}", "8", True),
        ("8\\text{ metres}", "8\\text{ m}", True),
        ("8 inches", "8\\text{ in}", True),
        ("8\\text{ cm}", "8\\text{ m}", False),
        ("8\\text{ square metres}", "8\\text{ m}^2", True),
        ("The answer is $14$.", "14", True),
        ("Therefore \\(x \\ge 4\\) is the solution.", "x \\geq 4", True),
        ("It is not $14$.", "14", False),
        ("The answer is $14$ million", "14", False),
        ("Of 3 there are $14$.", "14", False),
    ],
)
def test_what_is_only_written_otherwise_is_equal_and_nothing_else(answer, gold, equal):
    """Failed before: fonts were deleted with what they held, and a list was a thousand."""
    assert outcome.math_equal(answer, gold, 30.0) == Verdict(equal)
    assert outcome.math_equal(gold, gold, 30.0) == Verdict(True)


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        # A unit is a word in a font, a known word, or a known symbol behind a space; a letter at a number is a factor.
        ("7t", "7", False),
        ("4m", "4", False),
        ("4m", "4\\text{ m}", True),
        ("4 m", "4", True),
        ("x+4s", "x+4", False),
        ("3\\pi h", "3\\pi", False),
        ("9 m/s", "9", True),
        ("9\\text{ m/s}", "9\\text{ metres per second}", True),
        ("9\\text{ m/s}", "9\\text{ m/s}^2", False),
        ("9\\text{ cm}^2", "9\\text{ cm}^3", False),
        ("9\\text{ cm}^2", "9 square centimeters", True),
        ("9 marbles", "9", True),
        ("9 marbles", "9\\text{ coins}", False),
        ("9 abc", "9", False),
        ("9 dozen", "9", False),
        ("9\\%", "9\\text{ kg}", False),
        ("9\\%", "9", True),
        ("9 theta", "9", False),
        ("9\\text{ percentage points}", "9", True),
        ("30 mph", "30\\text{ miles per hour}", True),
        # Primes, bases, and the case of a letter.
        ("g'(t)", "g(t)", False),
        ("g''(t)", "g'(t)", False),
        ("g'(t)", "g^{\\prime}(t)", True),
        ("7'", "7", False),
        ("214_7", "214", False),
        ("214_7", "214_{8}", False),
        ("0.11_2", "0.11", False),
        ("214_7", "214_{\\text{seven}}", True),
        ("214_7", "214\\text{ (base 7)}", True),
        ("B", "b", False),
        ("\\pi R^2", "\\pi r^2", False),
        ("B-b", "0", False),
        ("\\Delta", "\\delta", False),
        ("E", "e", False),
        ("SUNDAY", "Sunday", True),
        # Brackets and order.
        ("\\{3,4\\}", "(3,4)", False),
        ("\\{3,4\\}", "[3,4]", False),
        ("3, 4", "(3,4)", True),
        ("4, 3", "(3,4)", False),
        ("(4,3]", "(4,3)", False),
        ("((3,4),5)", "((4,3),5)", False),
        ("(\\tfrac12, \\sqrt{12})", "(0.5, 2\\sqrt3)", True),
        # Names of values.
        ("u=7", "v=7", False),
        ("u=7", "7", True),
        ("u=1, v=2", "v=2, u=1", True),
        ("u=1, v=2", "u=2, v=1", False),
        ("u=1, v=2", "(u,v)=(1,2)", True),
        ("u=1, v=2", "(2,1)", False),
        ("u=1, v=3; u=2, v=3", "(2,3), (1,3)", True),
        ("x_1=4, x_2=6", "6, 4", True),
        ("x_1=4, x_2=6", "x=6, x=4", True),
        ("a_1=4, a_2=6", "a_1=6, a_2=4", False),
        ("g(3)=7", "g(2)=7", False),
        ("g(3)=7", "7", True),
        ("2x=7", "x=7", False),
        ("7=u", "u=7", True),
        ("2t+1=u", "u=1+2t", True),
        # What has no decimal is exact.
        ("1/2^{90}", "1/2^{91}", False),
        ("\\frac{1}{50!}", "\\frac{1}{51!}", False),
        ("\\frac{\\sqrt2}{10^{20}}", "\\frac{\\sqrt3}{10^{20}}", False),
        ("\\frac{x}{2^{60}}", "\\frac{x}{2^{61}}", False),
        ("\\pi 10^{-30}", "1.6\\times 10^{-19}", False),
        ("2^{80}+1", "2^{80}", False),
        ("\\frac{1000001}{1000000}", "1", False),
        ("\\frac{1}{3}", "0.333333", True),
        ("\\sqrt2", "1.41421356", True),
        # Ways to write a number.
        ("4 000", "4000", True),
        ("4\\,000", "4,000", True),
        ("4{,}000", "4\\ 000", True),
        ("-4 000 000.5", "-4000000.5", True),
        ("\\{4 000, 5 000\\}", "5000, 4000", True),
        ("4 000,5 000", "4000, 5000", True),
        ("4 00", "400", False),
        ("4 100/3", "4100/3", False),
        ("3\\text{ million}", "3000000", True),
        ("\\$1.5\\text{ million}", "1500000", True),
        ("1\\frac12\\text{ billion dollars}", "1.5\\times10^9", True),
        ("10^{-30}", "1e-30", True),
        ("0.1\\overline{6}", "1/6", True),
        ("0.\\overline{6}", "0.6", False),
        ("30 percent", "30\\%", True),
        ("25\\text{ percent}", "\\frac14", True),
        # Ways to write a function.
        ("\\mathrm{cos} x", "\\cos x", True),
        ("\\operatorname{cos}^2(x)", "\\cos^2 x", True),
        ("2pi", "2\\pi", True),
        ("\\approx 2.5", "2.5", True),
        ("ln 3", "\\ln 3", True),
        ("\\mathrm{cos} x", "\\sin x", False),
        # Others.
        ("x > 4", "(4,\\infty)", True),
        ("x > 4", "[4,\\infty)", False),
        ("\\emptyset", "\\{\\}", True),
        ("\\foo{ 7", "7", False),  # its number isn't taken out of what nobody can read
        ("it is not \\{ 7", "7", False),
    ],
)
def test_what_math_verify_does_not_see_decides_before_it_is_asked(answer, gold, equal):
    assert outcome.math_equal(answer, gold, 30.0) == Verdict(equal)
    assert outcome.math_equal(gold, answer, 30.0) == Verdict(equal)
    assert outcome.math_equal(answer, answer, 30.0) == Verdict(True)
    assert outcome.math_equal(gold, gold, 30.0) == Verdict(True)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("x-4=3", "x=7"),
        ("2x=7", "x=\\frac72"),
        ("x+2y=6", "y=3-\\frac{x}{2}"),
        ("x-4>3", "x>7"),
        ("x-4>3", "(7,\\infty)"),
        ("|x|<3", "(-3,3)"),
        ("x^2\\le 9", "-3\\le x\\le 3"),
        ("x\\ge x", "\\emptyset"),
    ],
)
def test_a_copy_of_the_question_is_no_solution(answer, gold):
    assert outcome.math_equal(answer, gold, 30.0) == Verdict(False)


HOSTILE = [
    "{" * 1000,
    "{" * 500 + "}" * 500,
    "\\text{" * 200,
    "(" * 999,
    "1," * 500,
    "=" * 999,
    "{}" * 10**6,
    "A" + " " * 990 + "1",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_prepared(text):
    prepared = math_text.prepare(text)
    assert all(math_text.number(item) is None or item == "1" for item in prepared.items)


def test_golds_of_a_real_file_equal_themselves_and_no_other():
    path = Path(__file__).parents[2] / "../shared/data/gsm8k_train.jsonl"
    if not path.is_file():
        pytest.skip("GSM8K is not here: shared/data/gsm8k_train.jsonl beside the repository")
    with path.open() as lines:
        golds = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines]
    assert len(golds) == 7473
    distinct = sorted(set(golds))
    for i, gold in enumerate(distinct):
        assert outcome.math_equal(gold, gold, 1.0) == Verdict(True)
        for other in distinct[i + 1 : i + 12]:
            same = int(gold.replace(",", "")) == int(other.replace(",", ""))
            assert outcome.math_equal(gold, other, 1.0) == Verdict(same), (gold, other)
    for gold in golds[:400]:
        for answer in (
            gold,
            f"\\text{{{gold}}}",
            f"\\boxed{{{gold}}}",
            f"{{{gold}}}",
            f"\\${gold}",
            f"x={gold}\\text{{ km}}",
        ):
            assert outcome.math_equal(answer, gold, 1.0) == Verdict(True), (answer, gold)
        assert outcome.math_equal(f"{gold}1", gold, 1.0) == Verdict(False)


@given(st.text(alphabet="0123456789.,-+/eE%${}\\ frac", max_size=30), st.integers())
def test_any_text_is_cleaned_and_read_without_an_error(text, number):
    for item in math_text.prepare(text).items:
        math_text.number(item)
    assert math_text.number(math_text.prepare(f"{number:,}").latex) == number


@st.composite
def written_numbers(draw):
    """(a number as text, its value, whether it is a decimal)"""
    n = draw(st.integers(-3000, 3000) | st.integers(-(10**9), 10**9))
    bottom, power = draw(st.integers(1, 12)), draw(st.integers(0, 9))
    sign, size = "-" if n < 0 else "", abs(n)
    whole, rest = divmod(size, bottom)
    grouped = f"{n:,}"
    forms = [
        *((grouped.replace(",", comma), Fraction(n)) for comma in ("", ",", "{,}", " ", "\\,", "\\ ", ",\\!")),
        *(
            (form % (sign, size, bottom), Fraction(n, bottom))
            for form in ("%s\\frac{%d}{%d}", "%s\\dfrac{%d}{%d}", "%s%d/%d")
        ),
        *((form % (sign, whole, rest, bottom), Fraction(n, bottom)) for form in ("%s%d\\frac{%d}{%d}", "%s%d %d/%d")),
        (f"{n}\\times10^{{{-power}}}", Fraction(n, 10**power)),
        (f"{n}\\cdot 10^{{{power}}}", Fraction(n) * 10**power),
        (f"{n}\\text{{ million}}", Fraction(n) * 10**6),
        (f"x = {n} billion", Fraction(n) * 10**9),
    ]
    digits = f"{size:0{power + 1}}"
    forms.append((f"{sign}{digits[: len(digits) - power]}.{digits[len(digits) - power :]}", Fraction(n, 10**power)))
    form = draw(st.integers(0, len(forms) - 1))
    return *forms[form], form == len(forms) - 1


@given(written_numbers(), written_numbers())
def test_two_numbers_are_equal_if_their_values_are(a, b):
    (text, value, decimal), (gold, gold_value, gold_decimal) = a, b
    size = max(abs(value), abs(gold_value))
    tolerance = Fraction(1, 10**6) * (1 if size >= Fraction(1, 1000) else size) if decimal or gold_decimal else 0
    assert outcome.math_equal(text, gold, 30.0) == Verdict(abs(value - gold_value) <= tolerance)
    assert outcome.math_equal(gold, text, 30.0) == Verdict(abs(value - gold_value) <= tolerance)


@given(written_numbers())
def test_one_number_in_two_forms_is_equal(number):
    text, value, _ = number
    assert outcome.math_equal(text, f"\\frac{{{value.numerator}}}{{{value.denominator}}}", 30.0) == Verdict(True)


@st.composite
def written_powers(draw):
    """(an expression for math-verify, its value)"""
    a, b, n = draw(st.integers(1, 9)), draw(st.integers(2, 9)), draw(st.integers(0, 70))
    forms = [
        (f"\\frac{{{a}}}{{{b}^{{{n}}}}}", Fraction(a, b**n)),
        (f"{a}\\cdot {b}^{{{-n}}}", Fraction(a, b**n)),
        (f"{b}^{{{n}}}+{a}", Fraction(b**n + a)),
        (f"\\frac{{{a}}}{{{b}!}}", Fraction(a, math.factorial(b))),
        (f"\\sqrt{{{b * b}}}-{a}", Fraction(b - a)),
        (f"1-\\frac{{1}}{{{b}^{{{n}}}}}", 1 - Fraction(1, b**n)),
    ]
    return draw(st.sampled_from(forms))


@settings(max_examples=60)
@given(written_powers(), written_powers())
def test_two_exact_expressions_are_equal_if_their_values_are(a, b):
    """Failed before: `1/2^{99}` was `1/2^{98}`."""
    (text, value), (gold, gold_value) = a, b
    assert outcome.math_equal(text, gold, 30.0) == Verdict(value == gold_value)
    assert outcome.math_equal(text, f"\\frac{{{value.numerator}}}{{{value.denominator}}}", 30.0) == Verdict(True)


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
        ("New~York\\,City", "New York City", 1.0),
        ("\\text{New}\\quad\\text{York}", "New York", 1.0),
        ("Ｒ２Ｄ２", "r2d2", 1.0),
        ("Zürich", "Zurich", 0.0),  # another letter, not another typography
    ],
)
def test_qa_f1(answer, gold, f1):
    assert outcome.qa_f1(answer, gold) == pytest.approx(f1)


def test_score_takes_the_best_gold():
    qa = Task(id="q", question="?", golds=("Frank Lowy", "Lowy"), kind="qa")
    assert outcome.score_answer("lowy", qa, 1.0) == outcome.AnswerScore(1.0, True)
    assert outcome.score_answer("Frank X Y Z", qa, 1.0).value == pytest.approx(1 / 3)
    assert not outcome.score_answer("Frank X Y Z", qa, 1.0).correct
    sums = Task(id="m", question="?", golds=("1", "2"))
    assert outcome.score_answer("2", sums, 1.0) == outcome.AnswerScore(1.0, True)
    assert outcome.score_answer("3", sums, 1.0) == outcome.AnswerScore(0.0, False)
    assert outcome.score_answer(None, sums, 1.0) == outcome.AnswerScore(0.0, False)


def test_a_failed_comparison_is_noted(monkeypatch):
    monkeypatch.setattr(
        verifier, "equal", lambda answer, gold, timeout_s: Verdict(False, "timeout", f"{gold} took long")
    )
    sums = Task(id="m", question="?", golds=("\\pi", "\\tau"))
    assert outcome.score_answer("\\sqrt{2}", sums, 1.0) == outcome.AnswerScore(0.0, False, "timeout", "\\pi took long")
    assert outcome.score_answer("\\tau", sums, 1.0) == outcome.AnswerScore(1.0, True)
