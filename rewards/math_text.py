"""Prepares mathematical answers for a comparison: removes what changes only their looks, and keeps their meaning.

Answers are hostile text. Those longer than math-verify may read stay unchanged, and the work on others takes milliseconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards import units
from rewards.verifier import MAX_CHARS
from trajectory import typography

_IN_FONT = rf"\\(?:{typography.FONTS})\s*\{{\s*"
_SQUARE_METRES = re.compile(r"(?<=\d) ?[cdkm]?m[²³]\.?\s*\Z")  # `5m^2` may be a polynomial
_FONT_WORDS = re.compile(rf"{_IN_FONT}([^{{}}]*)\}}")
_WORD = re.compile(r"[a-zA-Z]{2,}")
_ALL_WORDS = re.compile(r"[a-zA-Z]{3,}(?: [a-zA-Z]+)*|no", re.IGNORECASE)
_JOINED = re.compile(r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*")
_APPROXIMATELY = re.compile(r"\A\s*\\approx(?![a-zA-Z])\s*")
_DELIMITERS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
_CURRENCY = re.compile(r"\\\$|[€£¥]")
_QUOTED = re.compile(r"""(["'])([^"']*)\1""")
_NAMED = re.compile(  # `x =`, `x_1 =`, `f'(x) =`, `(x, y) =`, `x \in` and `x \approx`
    r"([a-zA-Z]'*(?:_(?:\w|\{\w{1,3}\}))?(?:\([a-zA-Z\d](?:, ?[a-zA-Z\d]){0,3}\))?|\([a-zA-Z](?:, ?[a-zA-Z]){1,3}\))"
    r"\s*(?:=(?!=)|\\(?:in|approx)(?![a-zA-Z]))\s*"
)
_TURNED = re.compile(r"([^=<>!:]+?)\s*(?<!\\)=\s*([a-zA-Z])\.?")
_INDEX = re.compile(r"_\w+")
_EQUALS = re.compile(r"\s*(?<![<>!:=])=(?!=)\s*")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3}){1,12}(?!\d|,\d)")
_SPACED_THOUSANDS = re.compile(
    r"(?<![\w.}/^\\])(?<![\d}] )[1-9]\d{0,2}(?: \d{3}){1,12}(?! ?[\d/^_]| ?\\frac)"  # `2 100/3` is a mixed number
)
_DECIMAL_COMMA = re.compile(
    r"([-+]?0),(\d{3,40})"
)  # this can't be a thousand, and nobody lists 0 and 111 without a space
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"(?<=[\d}}])\s*(?P<font>{_IN_FONT})?(?P<scale>{'|'.join(_SCALES)})(?![a-zA-Z])\s*(?P<end>\}})?")
_PERCENT_WORD = r"(?:percentage|percent|pct)"
_PERCENT = re.compile(rf"(?<=[\d}}])\s*(?:{_PERCENT_WORD}(?![a-zA-Z])|{_IN_FONT}{_PERCENT_WORD}\s*\}})")
_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASE = rf"(\d+|{'|'.join(_BASES)}|sixteen)"
_IN_BASE = re.compile(
    rf"(?<=[\dA-F])\s*(?:_\s*(?:(\d+)|\{{\s*(?:{_IN_FONT})?\(?(?:base )?{_BASE}\)?\s*\}}?\s*\}})"
    rf"|\(?(?:{_IN_FONT})?\(?(?:in )?base\s*\}}?\s*{_BASE}\s*\}}?\)?\}}?\s*\Z)"
)
_PRIMES = re.compile(r"\s*\^\s*(?:\{((?:\s*\\prime)+)\s*\}|\\prime(?![a-zA-Z]))")
_PLAIN_COMMAND = re.compile(r"(?<![a-zA-Z\\])(arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|csc|ln|log|exp|pi)(?![a-zA-Z])")
# `f'` and `5'`, and `123_5`: math-verify doesn't see these marks.
_MARKS = re.compile(
    r"""([a-zA-Z)\]}])('+)(?![a-zA-Z])|(\d)(['"]+)|(?<![\w^{.])([\dA-F]*\d[\dA-F]*(?:\.[\dA-F]+)?)_\{?(\d+)"""
)
_CAPITALS = re.compile(r"\\(?:Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega)(?![a-zA-Z])")
_SINGLE_SCRIPT = re.compile(r"([_^])\{(\w)\}(?!\w)")
_FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\(([^$]+?)\\\)|\\\[([^$]+?)\\\]")
# Words around a formula that may change its meaning. Another number or formula must not be there either.
_CHANGES_IT = re.compile(
    r"[\d\\$]|\b(?:not|no|never|isn|or|and|than|about|between|except|minus|negative|plus|times|half|double|twice|"
    r"hundred|thousand|million|billion|trillion|dozen|percent)\b",
    re.IGNORECASE,
)
_DEGREES = re.compile(r"\^\\circ\s*\Z")

_NUMBER = re.compile(r"[-+]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:[eE][-+]?\d{1,3})?")
_REPEATING = re.compile(r"([-+]?)(\d{0,40})\.(\d{0,40})\\overline\{(\d{1,40})\}")
_POWER_OF_TEN = re.compile(
    r"(?:(?<=[\d.}])\s*(?:\\times|\\cdot|\*)\s*|(?<![^-+]))10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3}))\Z"
)
_FRACTION = re.compile(
    r"([-+]?)(?:(\d{1,40})(?: |(?=\\)))?(?:\\frac\{([-+]?\d{1,40})\}\{([-+]?\d{1,40})\}|([-+]?\d{1,40})/(\d{1,40}))"
)


@dataclass(frozen=True, slots=True)
class MathText:
    latex: str  # without fonts, without a unit at its end, and without the `x =` before a value
    named: str  # `latex` with its `x =`
    items: tuple[
        str, ...
    ]  # of a list without brackets or of a set; otherwise the text alone. Their order doesn't count
    names: tuple[str, ...]  # for each item the `x` of its `x =`; empty if it has none
    is_set: bool  # written with braces
    words: tuple[str, ...]  # those that were in a font and were kept, in lower case
    unit: str  # the unit behind the number, under one name; see `units.without_unit`
    written: str  # `compact`, with its unit

    @property
    def compact(self) -> str:
        """`latex` without spaces and some signs, see the function `compact`."""
        return compact(self.latex)

    @property
    def is_words(self) -> bool:
        return bool(self.words) or _ALL_WORDS.fullmatch(self.latex) is not None

    def values_by_name(self, other: MathText) -> dict[str, tuple[str, ...]] | None:
        """The items of each name, if all have one. `x_1` and `x_2` count as x if the other text has only x."""
        if not all(self.names):
            return None
        same = all(other.names) and not any(map(_INDEX.search, other.names))
        names = [_INDEX.sub("", name) for name in self.names] if same else list(self.names)
        return {name: tuple(item for item, its in zip(self.items, names, strict=True) if its == name) for name in names}


def prepare(text: str) -> MathText:
    """Split `text` into its parts. A text that is too long for math-verify stays as it is."""
    if len(text) > MAX_CHARS:
        return MathText(text, text, (text,), ("",), False, (), "", text)
    text = _in_sentence(_in_box(text))
    text = typography.plain_latex(_SQUARE_METRES.sub("", typography.fold(text))).replace("{,}", ",")
    text = _one_space(_CURRENCY.sub("", _DELIMITERS.sub(" ", text)))
    if quoted := _QUOTED.fullmatch(text):
        text = quoted[2]
    text = _one_notation(_APPROXIMATELY.sub("", _without_outer_braces(text)))
    written = compact(typography.unwrap(text))
    text, unit = units.without_unit(text)
    if not unit and text.endswith("%"):
        unit = "%"  # this sign is kept, as 50% is also 1/2
    words = tuple(w.lower() for part in _FONT_WORDS.findall(text) for w in _WORD.findall(_JOINED.sub(" ", part)))
    text = _without_outer_braces(_JOINED.sub(", ", _one_space(typography.unwrap(text))).strip())
    text = _PLAIN_COMMAND.sub(r"\\\1 ", text)
    named = text
    name, text = _name_and_value(text)
    if not name and (turned := _TURNED.fullmatch(text)):
        name, text = turned[2], turned[1]
    if len(text) > 1 and text.endswith("."):
        text = text[:-1]
    is_set = text.startswith("\\{") and text.endswith("\\}") and not text[2:-2].isspace() and len(text) > 4
    names, items = [], []
    for part in _items(text[2:-2] if is_set else text, thousands=not is_set):
        its_name, value = _name_and_value(part.strip())
        name = its_name or name  # in `x = 1, 2` both are x
        names.append(name)
        items.append(value)
    latex = items[0] if len(items) == 1 and not is_set else f"\\{{{', '.join(items)}\\}}"
    if len(items) == 1 and (found := components(items[0])) and name.count(",") == len(found[1]) - 1:
        names, items = name[1:-1].split(","), list(found[1])  # `(x, y) = (1, 2)`
    return MathText(latex, named, tuple(items), tuple(names), is_set, words, unit, written)


def compact(text: str) -> str:
    """`text` without spaces and without signs of currency, percent and degrees. The space of `1 1/2` is kept."""
    text = _DEGREES.sub("", text.strip()).replace("\\%", "").replace("%", "")
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    text = _SINGLE_SCRIPT.sub(r"\1\2", text)
    return _DECIMAL_COMMA.sub(r"\1.\2", text) if _DECIMAL_COMMA.fullmatch(text) else text


def number(text: str) -> Fraction | None:
    """The value of a decimal, fraction, mixed number or repeating decimal, also times a power of ten; None otherwise."""
    text = compact(text)
    scale = Fraction(1)
    if power := _POWER_OF_TEN.search(text):
        scale, text = Fraction(10) ** int(power[1] or power[2]), text[: power.start()]
        if text in ("", "-", "+"):
            text += "1"
    if match := _FRACTION.fullmatch(text):
        whole, top, bottom = int(match[2] or 0), int(match[3] or match[5]), int(match[4] or match[6])
        if not bottom or (match[2] and (top < 0 or bottom < 0)):
            return None
        value = whole + Fraction(top, bottom)
        return scale * (-value if match[1] == "-" else value)
    if match := _REPEATING.fullmatch(text):
        before, repeated = match[2] + match[3], match[4]
        value = Fraction(int(before + repeated) - int(before or 0), 10 ** len(match[3]) * (10 ** len(repeated) - 1))
        return scale * (-value if match[1] == "-" else value)
    return scale * Fraction(text) if _NUMBER.fullmatch(text) else None


def is_rounded(text: str) -> bool:
    """Whether a number is written as a decimal, which may be an approximation."""
    return "." in text and "\\overline" not in text


def components(text: str) -> tuple[str, tuple[str, ...]] | None:
    """The brackets (such as `(]`) and the two or more parts of a tuple or an interval; None for anything else."""
    if len(text) < 5 or text[0] not in "([" or text[-1] not in ")]":
        return None
    parts = _items(text[1:-1], thousands=False)
    depth = 0
    for character in text[1:-1]:  # `(1,2) \cup (3,4)` is no tuple
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
    return (text[0] + text[-1], tuple(part.strip() for part in parts)) if len(parts) > 1 else None


def marks(text: str) -> list[tuple[str, ...]]:
    """The marks in `text` that math-verify doesn't see: primes, the bases of numbers, and capitals of Greek letters."""
    return sorted(match.groups("") for match in _MARKS.finditer(text)) + sorted({(c,) for c in _CAPITALS.findall(text)})


def sides_to_check(text: str) -> list[str]:
    """For a chain of equations: its last side, and all others that are numbers. `3+3=6` claims two values, and so does
    `5=6`.

    A side with letters may only name the value of the last one (`S = ab = 6`). Without an equation: `text` alone.
    """
    *others, last = _EQUALS.split(text)
    return [*(side for side in others if side and not re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", side)), last]


def _one_space(text: str) -> str:
    """`text` with single spaces, as the patterns here take quadratic time or more for many spaces in a row."""
    return " ".join(text.split())


def _one_notation(text: str) -> str:
    """Writes `1 000` as 1000, `2 million` as a power of ten, `percent` as its sign, bases as `_{5}` and primes as `'`."""
    text = _SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), text)
    text = _PERCENT.sub(r"\\%", _SCALED.sub(_power_of_ten, text))
    text = _PRIMES.sub(lambda m: "'" * (m[1] or "\\prime").count("\\"), text)
    return _IN_BASE.sub(_as_subscript, text)


def _power_of_ten(match: re.Match[str]) -> str:
    power = f"\\times 10^{{{_SCALES[match['scale']]}}}"
    if match["font"]:
        return power if match["end"] else power + match["font"]
    return power + (match["end"] or "")


def _as_subscript(match: re.Match[str]) -> str:
    base = next(group for group in match.groups() if group)
    if not base.isdigit():
        base = "16" if base == "sixteen" else str(_BASES.index(base) + 2)
    return f"_{{{base}}}"


def _name_and_value(text: str) -> tuple[str, str]:
    """The `x` of an `x =` at the start of `text`, or an empty text, and the rest."""
    name = _NAMED.match(text)
    return (re.sub(r"[ {}]", "", name[1]), text[name.end() :]) if name else ("", text)


def _in_box(text: str) -> str:
    r"""The content of the only box, if it is at the end (`so it is $\boxed{12}$.`), else `text`."""
    if text.count("\\boxed{") != 1:  # two boxes are two values
        return text
    inside = text.partition("\\boxed{")[2].rstrip(" \n.$")
    depth = 1
    for i, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[:i] if i == len(inside) - 1 else text
    return text


def _in_sentence(text: str) -> str:
    """The only formula of a sentence (`The answer is $12$.`), if the words around it don't change it, else `text`."""
    found = list(_FORMULA.finditer(text))
    if len(found) != 1:
        return text
    around = text[: found[0].start()] + " " + text[found[0].end() :]
    if not _WORD.search(around) or _CHANGES_IT.search(around):
        return text
    return next(group for group in found[0].groups() if group is not None).strip()


def _without_outer_braces(text: str) -> str:
    while text.startswith("{") and text.endswith("}"):
        depth = 0
        for i, character in enumerate(text):
            depth += (character == "{") - (character == "}")
            if depth == 0 and i < len(text) - 1:
                return text
        text = text[1:-1].strip()
    return text


def _items(text: str, thousands: bool) -> list[str]:
    """`text`, split at the commas or semicolons outside brackets. `1,234` is one number unless it is in a set.

    Between semicolons, commas make a tuple: `p=5, q=2; p=7, q=2` are (5,2) and (7,2).
    """
    if _DECIMAL_COMMA.fullmatch(text.strip()):
        return [text.strip().replace(",", ".")]
    if thousands:
        text = _outside_brackets(text)
    groups = _split(text, ";")
    if len(groups) == 1:
        return _split(text, ",")
    parts = [[_name_and_value(part.strip())[1] for part in _split(group, ",")] for group in groups]
    return [f"({', '.join(of)})" if len(of) > 1 else group for of, group in zip(parts, groups, strict=True)]


def _split(text: str, separator: str) -> list[str]:
    items, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == separator and depth == 0:
            items.append(text[start:i])
            start = i + 1
    return [*items, text[start:]]


def _outside_brackets(text: str) -> str:
    """`text` without the commas of thousands, except those in round brackets, square brackets and sets."""
    pieces, depth, end = [], 0, 0
    for match in re.finditer(r"\\[{}]|[()\[\]]", text):
        piece = text[end : match.start()]
        pieces += [_joined_thousands(piece) if depth <= 0 else piece, match[0]]
        depth += 1 if match[0][-1] in "([{" else -1
        end = match.end()
    return "".join((*pieces, _joined_thousands(text[end:])))


def _joined_thousands(text: str) -> str:
    return _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
