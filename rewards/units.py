r"""Units behind a number: `17\text{ metres}`, `12 cm^2`, `5 m/s`.

A unit is one of these: a word in a font, a known word, or, after a space, a known symbol or any word of four letters or
more. `2t` and `5m` have no unit: they are products.
"""

from __future__ import annotations

import re

from trajectory import typography

_WORDS = (
    "mm|cm|dm|km|kg|mg|ml|mL|ft|lbs?|oz|mph|kph|hrs?|mins?|secs?|"
    "inch(?:es)?|feet|foot|yards?|miles?|(?:centi|milli|kilo)?met(?:er|re)s?|(?:kilo)?grams?|lit(?:er|re)s?|pounds?|"
    "hours?|minutes?|seconds?|days?|weeks?|months?|years?|dollars?|cents?|degrees?|radians?|units?"
)
_SYMBOLS = "m|g|s|h|l|L|N|J|W|V|K|in|yd|mi|rad|Hz|kHz|Pa|kPa|kJ|kW|kN|mol|(?:k?m|mi|ft)/(?:s|h|hr|min)"
# These words in a font change the number, or are one.
_NO_UNIT = (
    r"(?:[ijke]|and|or|a\.?m\.?|p\.?m\.?|hundred|thousand|million|billion|trillion|dozen|mod.*|base.*|"
    r"per ?cent|percentage|pct)"
)
# These words, of four letters and more, are factors.
_FACTORS = "alpha|beta|gamma|delta|epsilon|zeta|theta|iota|kappa|lambda|sigma|omega|infinity|sqrt|sinh|cosh|tanh"
_POWER = r"(?:\s*\^\s*(?:\d|\{\d\}))?"
_BEHIND_NUMBER = r"(?:(?<=[\d})\]])|(?<=\\pi)|(?<=\\pi )|(?<=\d\.))\s*"
_IN_FONT = re.compile(
    rf"{_BEHIND_NUMBER}\\(?:{typography.FONTS})\s*\{{\s*(?!{_NO_UNIT}\s*\}})[a-zA-Z][a-zA-Z./ ^²³]*\}}{_POWER}\.?\s*\Z",
    re.IGNORECASE,
)
_BARE = re.compile(
    rf"{_BEHIND_NUMBER}(?:(?:square|sq\.?|cubic|cu\.?)\s+)?(?:{_WORDS}){_POWER}\.?\s*\Z"
    rf"|(?<=\d) +(?:(?:{_SYMBOLS}){_POWER}|(?!(?:{_NO_UNIT}|{_FACTORS})\.?\s*\Z)[a-z]{{4,}})\.?\s*\Z"
)
_NAMES = {
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
        ("mi/h", "mph"),
        ("km/h", "kph", "kmph"),
    )
    for name in names
}
_PER = re.compile(r"\s*(?:/|\bper\b)\s*")
_ONE = re.compile(
    r"(?:(?P<square>square|sq)\.? |(?P<cubic>cubic|cu)\.? )?(?P<name>[a-z]+(?: [a-z]+)*)(?: ?\^ ?\{?(?P<power>\d)\}?)?"
)
_WORD = re.compile(r"[a-zA-Z]{2,}")


def without_unit(text: str) -> tuple[str, str]:
    r"""`text` without its unit, and the unit under one name: `m^2` for `square metres` and `m^{2}`.

    The name is empty if there is no unit, and for one that isn't made of words, powers and `/`.
    """
    for pattern in (_IN_FONT, _BARE):
        shorter = pattern.sub("", text)
        # A unit in the middle (`2 hours 30 minutes`) makes the last one a part of the number.
        if shorter != text and not _WORD.search(re.sub(r"\\[a-zA-Z]+", "", shorter)):
            return shorter, _name(text[len(shorter) :])
    return text, ""


def _name(unit: str) -> str:
    plain = " ".join(typography.unwrap(unit).lower().split()).rstrip(".")
    parts = []
    for part in _PER.split(plain):
        one = _ONE.fullmatch(part)
        if not one:
            return ""
        singular = one["name"].removesuffix("s") if len(one["name"]) > 1 else one["name"]
        power = "2" if one["square"] else "3" if one["cubic"] else one["power"]
        parts.append(_NAMES.get(singular, singular) + (f"^{power}" if power else ""))
    return "/".join(parts)
