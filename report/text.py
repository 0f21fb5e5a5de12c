"""Formats numbers, names and hostile text for the report page. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from report.data import StageResult, Summary
from trajectory.markup import shortened

SPACE = "\u00a0"  # between a number and its unit: no line break

STAGE_NAMES = {"base": "base", "sft": "SFT", "grpo": "GRPO", "reward_model": "reward model", "synthesize": "synthesis"}

# Control characters, direction overrides and marks, invisible characters, lone surrogates, tags: all that can make text look
# like other text, or that HTML can't hold. Newline and tab are kept.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffc\ufffe\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """`text` in which every invisible character, and every one that changes the direction, is spelled out as `⟦U+202E⟧`."""
    return _UNSEEN.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", text)


def cut(text: str, limit: int) -> str:
    """`visible(text)` in about `limit` characters. A longer text keeps its beginning and end, with a note between them."""
    left_out = max(0, len(text) - 2 * limit)
    # What can't be shown anyway is left out first, so that the work is bounded, as spelling out makes text longer.
    shown = visible(text[:limit] + text[-limit:] if left_out else text)
    left_out += max(0, len(shown) - limit)
    return shortened(shown, limit, f"[… {count(left_out)} characters left out …]")


def percent(value: float | None, digits: int = 1) -> str:
    """0.536 → "53.6 %"."""
    return f"{100 * value:.{digits}f}{SPACE}%" if value is not None and math.isfinite(value) else "–"


def decimal(value: float | None, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else "–"


def signed(value: float | None, digits: int = 2) -> str:
    """The number with its sign; a negative one has a real minus sign, not a hyphen."""
    return f"{value:+.{digits}f}".replace("-", "−") if value is not None and math.isfinite(value) else "–"


def count(value: float) -> str:
    """1234 → "1,234"."""
    return f"{value:,.0f}"


def short(value: float) -> str:
    """A number in about four characters: 3384 → "3.4k", 0.00763 → "0.0076", 7.6e-06 → "7.6e−6"."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e6:
        text = f"{value / 1e6:.3g}M"
    elif size >= 1e3:
        text = f"{value / 1e3:.3g}k"
    elif size >= 1e-3 or size == 0:
        text = f"{value:.3g}" if size >= 0.01 else f"{value:.2g}"
    else:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return text.replace("-", "−")


def seconds(value: float | None) -> str:
    """163.4 → "2 min 43 s"."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 60:
        return f"{value:.0f}{SPACE}s" if value >= 10 else f"{value:.1f}{SPACE}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def stage_name(name: str) -> str:
    """The name of a stage on the page."""
    return visible(STAGE_NAMES.get(name, name))[:60]


def words(name: str) -> str:
    """`bad_format` → "bad format"."""
    return visible(name.replace("_", " "))[:80]


def verdict(summary: Summary) -> str:
    """One sentence about the run: how accuracy changed between the first stage and the last.

    A difference within the 95 % interval of two independent proportions counts as none.
    """
    if not summary.stages:
        return "No stage was evaluated."
    first, last = summary.stages[0], summary.stages[-1]
    on = f"on {count(last.num_problems)} unseen problems"
    if len(summary.stages) == 1:
        return f"{_capital(stage_name(last.name))} answers {percent(last.accuracy)} {on} correctly."
    if len(summary.stages) == 2:
        who = _capital(stage_name(last.name))
    else:
        names = [stage_name(stage.name) for stage in summary.stages[1:]]
        who = _capital(f"{', '.join(names[:-1])} and {names[-1]}")
    change = f"from {percent(first.accuracy)} to {percent(last.accuracy)} {on}"
    if abs(last.accuracy - first.accuracy) <= _interval_of_difference(first, last):
        return f"{who} made no difference that can be told from chance: accuracy went {change}."
    return f"{who} {'raised' if last.accuracy > first.accuracy else 'lowered'} accuracy {change}."


def _interval_of_difference(first: StageResult, last: StageResult) -> float:
    return math.hypot(first.accuracy_ci95 or 0.0, last.accuracy_ci95 or 0.0)


def listing(items: Sequence[str]) -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
