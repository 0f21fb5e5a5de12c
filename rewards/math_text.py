"""Mathematical answers, prepared for a comparison: what only changes how they look is gone, and what they say is kept.

Answers are hostile text: longer ones than math-verify reads are left alone, and the rest takes milliseconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.verifier import MAX_CHARS
from trajectory import typography

_WORDS_OF_UNITS = (
    "mm|cm|dm|km|kg|mg|ml|mL|ft|lbs?|oz|mph|kph|hrs?|mins?|secs?|"
    "inch(?:es)?|feet|foot|yards?|miles?|(?:centi|milli|kilo)?met(?:er|re)s?|(?:kilo)?grams?|lit(?:er|re)s?|pounds?|"
    "hours?|minutes?|seconds?|days?|weeks?|months?|years?|dollars?|cents?|percent|degrees?|radians?|units?"
)
# A word in a font behind a number is its unit, unless it is one of these: they change the number, or are one.
_NO_UNIT = r"(?:[ijke]|and|or|a\.?m\.?|p\.?m\.?|hundred|thousand|million|billion|trillion|dozen|mod.*|base.*)"
_POWER = r"(?:\s*\^\s*(?:\d|\{\d\}))?"
_BEHIND_NUMBER = r"(?:(?<=[\d})\]])|(?<=\\pi)|(?<=\\pi )|(?<=\d\.))\s*"
_UNIT_IN_FONT = re.compile(
    rf"{_BEHIND_NUMBER}\\(?:{typography.FONTS})\s*\{{\s*(?!{_NO_UNIT}\s*\}})[a-zA-Z][a-zA-Z./ ^²³]*\}}{_POWER}\.?\s*\Z",
    re.IGNORECASE,
)
_BARE_UNIT = re.compile(rf"{_BEHIND_NUMBER}(?:(?:square|sq\.?|cubic|cu\.?)\s+)?(?:{_WORDS_OF_UNITS}){_POWER}\.?\s*\Z")
_UNIT_NAMES = {
    name: names[0]
    for names in (
        ("mm", "millimeter", "millimetre"),
        ("cm", "centimeter", "centimetre"),
        ("m", "meter", "metre"),
        ("km", "kilometer", "kilometre"),
        ("g", "gram"),
        ("kg", "kilogram"),
        ("l", "liter", "litre"),
        ("ml", "milliliter", "millilitre"),
        ("in", "inch", "inche"),  # `inches` without its s
        ("ft", "foot", "feet"),
        ("yd", "yard"),
        ("mi", "mile"),
        ("lb", "pound"),
        ("oz", "ounce"),
        ("s", "sec", "second"),
        ("min", "minute"),
        ("h", "hr", "hour"),
    )
    for name in names
}
_PLAIN_UNIT = re.compile(r"[a-z ]+")
_SQUARE_METRES = re.compile(r"(?<=\d) ?[cdkm]?m[²³]\.?\s*\Z")  # `5m^2` may be a polynomial
_FONT_WORDS = re.compile(rf"\\(?:{typography.FONTS})\s*\{{([^{{}}]*)\}}")
_WORD = re.compile(r"[a-zA-Z]{2,}")
_JOINED = re.compile(r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*")
_DELIMITERS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
_CURRENCY = re.compile(r"\\\$|[€£¥]")
_NAMED = re.compile(r"(?:[a-zA-Z]|\([a-zA-Z](?:, ?[a-zA-Z]){1,3}\))\s*=(?!=)\s*")
_EQUALS = re.compile(r"\s*(?<![<>!:=])=(?!=)\s*")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3}){1,12}(?!\d|,\d)")
_DECIMAL_COMMA = re.compile(
    r"([-+]?0),(\d{3,40})"
)  # it can't be a thousand, and nobody lists 0 and 111 without a space
_FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\(([^$]+?)\\\)|\\\[([^$]+?)\\\]")
# Words around a formula that may change what it says; nor may there be another number or formula.
_CHANGES_IT = re.compile(
    r"[\d\\$]|\b(?:not|no|never|isn|or|and|than|about|between|except|minus|negative|plus|times|half|double|twice|"
    r"hundred|thousand|million|billion|trillion|dozen|percent)\b",
    re.IGNORECASE,
)
_DEGREES = re.compile(r"\^\\circ\s*\Z")

_NUMBER = re.compile(r"[-+]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:[eE][-+]?\d{1,3})?")
_POWER_OF_TEN = re.compile(r"\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3}))")
_FRACTION = re.compile(
    r"([-+]?)(?:(\d{1,40})(?: |(?=\\)))?(?:\\frac\{([-+]?\d{1,40})\}\{([-+]?\d{1,40})\}|([-+]?\d{1,40})/(\d{1,40}))"
)


@dataclass(frozen=True, slots=True)
class MathText:
    latex: str  # without fonts, a unit at its end, and the `x =` before a value
    named: str  # `latex` with its `x =`
    items: tuple[str, ...]  # of a list without brackets or a set, else itself alone; order means nothing
    words: tuple[str, ...]  # that stood in a font and were kept, in lower case
    unit: str  # what was dropped behind the number, by one name; empty without it, or for a unit with a power

    @property
    def compact(self) -> str:
        """`latex` without spaces and signs of currency, percent and degrees, apart from the space of `1 1/2`."""
        return _compact(self.latex)


def prepare(text: str) -> MathText:
    """Takes `text` apart; one that is too long for math-verify is left as it is."""
    if len(text) > MAX_CHARS:
        return MathText(text, text, (text,), (), "")
    text = _in_sentence(_in_box(text))
    text = typography.plain_latex(_SQUARE_METRES.sub("", typography.fold(text))).replace("{,}", ",")
    text = _CURRENCY.sub("", _DELIMITERS.sub(" ", text)).strip()
    text = _without_outer_braces(text)
    text, unit = _without_unit(text)
    words = tuple(w.lower() for part in _FONT_WORDS.findall(text) for w in _WORD.findall(_JOINED.sub(" ", part)))
    text = _without_outer_braces(_JOINED.sub(", ", typography.unwrap(text)).strip())
    named = text
    text = _without_name(text)
    if len(text) > 1 and text.endswith("."):
        text = text[:-1]
    inside = text[2:-2] if text.startswith("\\{") and text.endswith("\\}") else None
    parts = _items(text if inside is None else inside, thousands=inside is None)
    items = tuple(_without_name(part.strip()) for part in parts)
    latex = items[0] if len(items) == 1 and inside is None else f"\\{{{', '.join(items)}\\}}"
    return MathText(latex, named, items, words, unit)


def number(text: str) -> Fraction | None:
    """The value of a decimal, fraction, mixed number or power of ten, or None."""
    text = _compact(text)
    if match := _FRACTION.fullmatch(text):
        whole, top, bottom = int(match[2] or 0), int(match[3] or match[5]), int(match[4] or match[6])
        if not bottom or (match[2] and (top < 0 or bottom < 0)):
            return None
        value = whole + Fraction(top, bottom)
        return -value if match[1] == "-" else value
    power = 0
    if match := _POWER_OF_TEN.search(text):
        if match.end() != len(text):
            return None
        power, text = int(match[1] or match[2]), text[: match.start()]
    return Fraction(text) * Fraction(10) ** power if _NUMBER.fullmatch(text) else None


def sides_to_check(text: str) -> list[str]:
    """Of a chain of equations, its last side and all others that are numbers: `3+3=6` claims two values, `5=6` too.

    A side with letters may only name what the last one says (`S = ab = 6`). Without an equation: `text` alone.
    """
    *others, last = _EQUALS.split(text)
    return [*(side for side in others if not re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", side)), last]


def _compact(text: str) -> str:
    text = _DEGREES.sub("", text.strip()).replace("\\%", "").replace("%", "")
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    return _DECIMAL_COMMA.sub(r"\1.\2", text) if _DECIMAL_COMMA.fullmatch(text) else text


def _without_unit(text: str) -> tuple[str, str]:
    """`text` without what stands behind its number, and that by one name for `m`, `metre` and `meters`."""
    for pattern in (_UNIT_IN_FONT, _BARE_UNIT):
        shorter = pattern.sub("", text)
        # A unit within (`2 hours 30 minutes`) makes the last one a part of the number.
        if shorter != text and not _WORD.search(re.sub(r"\\[a-zA-Z]+", "", shorter)):
            behind = " ".join(typography.unwrap(text[len(shorter) :]).lower().split()).rstrip(".")
            if not _PLAIN_UNIT.fullmatch(behind):
                return shorter, ""
            singular = behind.removesuffix("s") if len(behind) > 1 else behind
            return shorter, _UNIT_NAMES.get(singular, singular)
    return text, ""


def _without_name(text: str) -> str:
    """`text` without the `x =` at its start."""
    name = _NAMED.match(text)
    return text[name.end() :] if name else text


def _in_box(text: str) -> str:
    r"""What the only box holds, if it stands at the end (`so it is $\boxed{12}$.`), else `text`."""
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
    """`text` split at the commas outside brackets; `1,234` is one number unless it stands in a set."""
    if _DECIMAL_COMMA.fullmatch(text.strip()):
        return [text.strip().replace(",", ".")]
    if thousands:
        text = _outside_brackets(text)
    items, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    return [*items, text[start:]]


def _outside_brackets(text: str) -> str:
    """`text` without the commas of thousands, apart from those in round and square brackets and sets."""
    pieces, depth, end = [], 0, 0
    for match in re.finditer(r"\\[{}]|[()\[\]]", text):
        piece = text[end : match.start()]
        pieces += [_joined_thousands(piece) if depth <= 0 else piece, match[0]]
        depth += 1 if match[0][-1] in "([{" else -1
        end = match.end()
    return "".join((*pieces, _joined_thousands(text[end:])))


def _joined_thousands(text: str) -> str:
    return _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
