"""Gives one spelling to text that differs only typographically: Unicode's look-alikes, LaTeX's fonts, spaces and synonyms.

To compare two texts, fold both first. Nothing here replaces a letter, a digit or an operator by another one. So `x²` stays
different from `x2`, `1½` from `11/2`, and `\\mathbb{R}` from `R`. All functions take time linear in the text, which may be
hostile.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

# UAX #15, "stream-safe": no writing system puts more marks on a letter, and sorting more of them takes quadratic time.
_MAX_MARKS = 30

_LOOK_ALIKES = {
    **dict.fromkeys("‐‑‒–—―−﹘﹣⁃", "-"),  # hyphens, dashes, minus
    **dict.fromkeys("‘’‚‛′´`ʹʻʼˈ＇", "'"),
    **dict.fromkeys("“”„‟″«»「」『』", '"'),
    **dict.fromkeys("。｡", "."),
    **dict.fromkeys("、､", ","),
    "〜": "~",
    "【": "[",
    "】": "]",
    "∕": "/",
    "⁄": "/",
    "∗": "*",
    "∶": ":",
    "¿": "",
    "¡": "",
    **{c: c for c in "ℝℤℕℚℂ"},  # sets of numbers, which are no letters
}
# Compatibility forms that are the same character for a reader. Superscripts, fractions and circled numbers are not among
# them, as they have another meaning.
_SAME_CHARACTER = (
    "<wide>",
    "<narrow>",
    "<noBreak>",
    "<compat>",
    "<font>",
    "<isolated>",
    "<initial>",
    "<medial>",
    "<final>",
)

FONTS = (
    "text|textrm|textbf|textit|textsf|texttt|textsc|textup|textmd|textnormal|emph|underline|"
    "mathrm|mathbf|mathit|mathsf|mathtt|mathnormal|mathup|boldsymbol|bm|pmb|"
    "mbox|hbox|fbox|boxed|operatorname\\*?"
)
"""LaTeX commands that change only the look of their argument, as alternatives of a regular expression."""

_FONT = re.compile(
    rf"\\(?:{FONTS})(?![a-zA-Z])\s*(?P<brace>\{{)?|\\(?:rm|bf|it|sf|tt|sc)(?![a-zA-Z])\s*|\\.|[{{}}]", re.DOTALL
)

_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303", "c": "\u0327", "v": "\u030c"}
_ACCENT = re.compile(r"""(?<!\\)\\(?:(['`^"~])|([cv])(?=[\s{]))\s*(?:\{\\?([a-zA-Z])(?![a-zA-Z])\}|\\?([a-zA-Z]))""")

_GREEK_NAMES = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma sigma tau upsilon phi chi
    psi omega phi epsilon theta Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega
"""
_GREEK = {
    c: f"\\{name} " for c, name in zip("αβγδεζηθικλμνξπρσςτυφχψωϕϵϑΓΔΘΛΞΠΣΥΦΨΩ", _GREEK_NAMES.split(), strict=True)
}
_SYMBOLS = {
    **_GREEK,
    "×": "\\times ",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "∙": "\\cdot ",
    "÷": "\\div ",
    "±": "\\pm ",
    "∓": "\\mp ",
    "≤": "\\le ",
    "⩽": "\\le ",
    "≥": "\\ge ",
    "⩾": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "≡": "\\equiv ",
    "∞": "\\infty ",
    "√": "\\sqrt ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "∅": "\\emptyset ",
    "∠": "\\angle ",
    "△": "\\triangle ",
    "→": "\\to ",
    "°": "^\\circ ",
    "º": "^\\circ ",
    "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}",
    "ℕ": "\\mathbb{N}",
    "ℚ": "\\mathbb{Q}",
    "ℂ": "\\mathbb{C}",
}
_SUPERSCRIPTS = {"⁰": "0", "¹": "1", "²": "2", "³": "3", **dict(zip("⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "456789+-()n", strict=True))}
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
_SCRIPTS = re.compile(f"([{''.join(_SUPERSCRIPTS)}]+)|([{''.join(_SUBSCRIPTS)}]+)")
_FRACTIONS = {c: f"\\frac{{{d[0]}}}{{{d[2]}}}" for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞" for d in [unicodedata.normalize("NFKD", c)]}

_SYNONYMS = {
    "dfrac": "\\frac",
    "tfrac": "\\frac",
    "cfrac": "\\frac",
    "leq": "\\le",
    "leqslant": "\\le",
    "geq": "\\ge",
    "geqslant": "\\ge",
    "neq": "\\ne",
    "ldots": "\\dots",
    "cdots": "\\dots",
    "dotsc": "\\dots",
    "dotsb": "\\dots",
    "rightarrow": "\\to",
    "varnothing": "\\emptyset",
    "lbrace": "\\{",
    "rbrace": "\\}",
    "degree": "^\\circ",
    "degrees": "^\\circ",
    "textdegree": "^\\circ",
    "dollar": "\\$",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "ast": "*",
    "colon": ":",
    "lt": "<",
    "gt": ">",
    **dict.fromkeys(
        [
            "left",
            "right",
            "big",
            "Big",
            "bigg",
            "Bigg",
            "bigl",
            "bigr",
            "Bigl",
            "Bigr",
            "biggl",
            "biggr",
            "Biggl",
            "Biggr",
            "displaystyle",
            "textstyle",
            "limits",
            "nolimits",
        ],
        "",
    ),
}
FUNCTIONS = "sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|coth|arcsin|arccos|arctan|ln|lg|log|exp|gcd|max|min|det|dim|arg"
"""Functions for which LaTeX has a command, as alternatives of a regular expression."""

_FUNCTION_IN_FONT = re.compile(  # `\mathrm{sin} x`; without an argument, `min` and `sec` are units
    rf"\\(?:{FONTS})\s*\{{({FUNCTIONS})\}}\s*(?=[\w({{^\\|])"
)
_COMMAND = re.compile(r"\\([a-zA-Z]+)\s*")
_SPACE = re.compile(r"(?<!\\)\\[,;:> \n]|~|\\!\s*|\\/")
_WIDE_SPACE = re.compile(r"\\(?:q?quad|enspace|(?:thin|med|thick)space)(?![a-zA-Z])")
_CIRC = re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])\s*")
_FRACTION = re.compile(r"\\frac\s*(?:(\d)|(\{[^{}]*\}))\s*(?:(\d)|(?=\{))")
_ROOT = re.compile(r"\\sqrt\s*([a-zA-Z0-9])")


def fold(text: str) -> str:
    r"""`text` in NFC, with one kind of hyphen, quote, space and width, and without invisible characters.

    LaTeX's accents (`Forl\`{i}`) become letters.
    """
    if "\\" in text:
        text = _ACCENT.sub(lambda m: (m[3] or m[4]) + _ACCENTS[m[1] or m[2]], text)
    if text.isascii():
        return text.replace("`", "'")
    return unicodedata.normalize("NFC", "".join(map(_folded, unicodedata.normalize("NFC", _few_marks(text)))))


@lru_cache(maxsize=4096)
def _folded(character: str) -> str:
    if (same := _LOOK_ALIKES.get(character)) is not None:
        return same
    if unicodedata.category(character) == "Cf":  # zero-width spaces, direction marks, soft hyphens
        return ""
    if unicodedata.decomposition(character).startswith(_SAME_CHARACTER):
        plain = unicodedata.normalize("NFKD", character)
        return "".join(_LOOK_ALIKES.get(c, c) for c in plain)
    return " " if character.isspace() else character


def _few_marks(text: str) -> str:
    kept, run = [], 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run <= _MAX_MARKS:
            kept.append(character)
    return "".join(kept)


def unwrap(text: str, write: Callable[[str], str] = str) -> str:
    r"""`text` without LaTeX's fonts: `\text{Paris}`, `{\bf Paris}` and `\textbf Paris` become `Paris`.

    The content of a font's braces is passed through `write`, innermost first. Other braces stay.
    """
    pieces: list[str] = []
    opened: list[tuple[int, bool]] = []  # (number of pieces before it, whether the braces belong to a font)
    end = 0
    for match in _FONT.finditer(text):
        pieces.append(text[end : match.start()])
        end = match.end()
        token = match[0]
        if match["brace"]:
            opened.append((len(pieces), True))
        elif token == "{":
            opened.append((len(pieces), False))
            pieces.append(token)
        elif token == "}":
            start, is_font = opened.pop() if opened else (0, False)
            if is_font:
                pieces[start:] = [write("".join(pieces[start:]))]
            else:
                pieces.append(token)
        elif len(token) == 2:  # an escaped character, or the start of another command
            pieces.append(token)
    return "".join((*pieces, text[end:]))


def plain_latex(text: str) -> str:
    r"""Folded `text` with one spelling of each LaTeX command, and LaTeX for mathematical characters (`≤`, `°`, `x²`, `½`).

    Spaces and sizes of brackets are removed: `\dfrac12\,` and `\frac{1}{2} ` then differ only in a space.
    """
    if not text.isascii():
        text = "".join(_FRACTIONS.get(c) or _SYMBOLS.get(c) or c for c in text)
        text = _SCRIPTS.sub(
            lambda m: f"^{{{m[1].translate(_UP)}}}" if m[1] else f"_{{{m[2].translate(_DOWN)}}}",
            text,
        )
    text = _COMMAND.sub(_one_spelling, _FUNCTION_IN_FONT.sub(r"\\\1 ", text))
    text = plain_spaces(text)
    text = _CIRC.sub(r"^\\circ ", text)
    text = _FRACTION.sub(_braced, text)
    return _ROOT.sub(r"\\sqrt{\1}", text)


def plain_spaces(text: str) -> str:
    r"""`text` with a space for each of LaTeX's (`~`, `\,`, `\quad`), and without `\!`, which removes space."""
    return _SPACE.sub(lambda m: "" if m[0].startswith(("\\!", "\\/")) else " ", _WIDE_SPACE.sub(" ", text))


_UP, _DOWN = str.maketrans(_SUPERSCRIPTS), str.maketrans(_SUBSCRIPTS)


def _one_spelling(match: re.Match[str]) -> str:
    same = _SYNONYMS.get(match[1])
    return match[0] if same is None else same + (" " if same[1:].isalpha() else "")


def _braced(match: re.Match[str]) -> str:
    top = match[2] or f"{{{match[1]}}}"
    return f"\\frac{top}" + (f"{{{match[3]}}}" if match[3] else "")
