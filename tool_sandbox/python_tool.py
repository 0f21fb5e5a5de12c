"""The tool `python`: which zygote a piece of code is for."""

from __future__ import annotations

import re

# A module that is only named in a string routes to the warm zygote, too: slower by some milliseconds, never wrong.
_HEAVY = re.compile(r"\b(?:numpy|scipy|sympy)\b")


def zygote_for(code: str) -> str:
    """`warm` (numpy, scipy and sympy are imported) for code that mentions one of them, else `cold`, which forks faster."""
    return "warm" if _HEAVY.search(code) else "cold"
