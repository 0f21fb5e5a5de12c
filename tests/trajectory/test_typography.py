"""Look-alikes become one spelling; letters, digits and operators stay what they are."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajectory import typography


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("plain 'text' - 1", "plain 'text' - 1"),
        ("2010–12", "2010-12"),
        ("−5", "-5"),
        ("Mira’s “hen”", 'Mira\'s "hen"'),
        ("Forl\u0069\u0300", "Forlì"),
        ("Forl\\`{i}, \\'Emile, Fran\\c{c}ois", "Forlì, Émile, François"),
        ("東京。１２３！", "東京.123!"),
        ("a\u00a0b\u3000c\u200bd", "a b cd"),
        ("ﬁve…", "five..."),
        ("x² ½ ① ℝ", "x² ½ ① ℝ"),  # said, not only written, in another way
    ],
)
def test_fold(text, folded):
    assert typography.fold(text) == folded


@pytest.mark.parametrize(
    ("text", "unwrapped"),
    [
        ("\\text{Paris}", "Paris"),
        ("\\boxed{\\textbf{ Paris }}", " Paris "),
        ("{\\rm cm} \\mathrm x", "{cm} x"),
        ("\\frac{\\text{a}}{b}", "\\frac{a}{b}"),
        ("\\textcolor{red}{x}", "\\textcolor{red}{x}"),
        ("\\mathbb{R} \\vec{v}", "\\mathbb{R} \\vec{v}"),
        ("\\text{a \\} b}", "a \\} b"),
        ("\\text{not closed", "not closed"),
        ("closed twice}}", "closed twice}}"),
    ],
)
def test_unwrap(text, unwrapped):
    assert typography.unwrap(text) == unwrapped


def test_unwrap_shows_the_content_to_its_writer():
    assert typography.unwrap("\\text{a \\mbox{b}}{c}", str.upper) == "A B{c}"


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\tfrac1{23}", "\\frac{1}{23}"),
        ("\\cfrac{x}3", "\\frac{x}{3}"),
        ("\\left(1,\\,2\\right)", "(1, 2)"),
        ("90°", "90^\\circ "),
        ("90^{\\circ}", "90^\\circ "),
        ("x²", "x^{2}"),
        ("x₁₂", "x_{12}"),
        ("½", "\\frac{1}{2}"),
        ("\\leftarrow", "\\leftarrow"),
        ("6,\\! 000", "6,000"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("2π", "2\\pi "),
        ("λΩ", "\\lambda \\Omega "),
        ("\\operatorname{tan} x", "\\tan x"),
        ("5\\text{ min}", "5\\text{ min}"),
        ("a\\quad~b", "a  b"),
    ],
)
def test_plain_latex(text, latex):
    assert typography.plain_latex(text) == latex


@given(st.text(max_size=100))
def test_folding_is_done_once(text):
    folded = typography.fold(text)
    assert typography.fold(folded) == folded
    assert unicodedata.is_normalized("NFC", folded)
