"""Decides when two questions are the same: when their keys are equal.

Case, spaces, sentence punctuation and typography don't count, nor which of LaTeX's ways to write the same thing is used
(`\\dfrac` and `\\frac`, `$…$` and `\\(…\\)`). Every number, operator, bracket and command counts: `12*3` isn't `12+3`, `1.5`
isn't `15`, and `\\arccos 1` isn't `\\arccos(-1)`.
"""

from __future__ import annotations

import re
import unicodedata

from trajectory import typography

_FUNCTIONS = "sin|cos|tan|cot|sec|csc|log|ln|exp|lcm|gcd|mod|max|min"
_FUNCTION = re.compile(rf"\\(?:{typography.FUNCTIONS})")
_WORD = r"[^\W\d_]"
_DELIMITERS = re.compile(r"\\?\$|\\[()\[\]]")
_ESCAPED = re.compile(r"\\([%#&_])|\{,\}")
_TOKEN = re.compile(
    rf"""
      (?P<command>  \\[a-zA-Z]+ | \\. )
    | (?P<dots>     \.{{3,}} )
    | (?P<number>   (?<![\d.]) (?!0) \d{{1,3}} (?:,\d{{3}})+ (?!\d) (?:\.\d+)? | \d+ (?:\.\d+)? | \.\d+ )
    | (?P<word>     {_WORD}+ (?:'{_WORD}+)* )
    | (?P<prime>    (?<=\b{_WORD}) '+ (?!\w) )                                     # f'(x)
    | (?P<factorial> (?<=[\d)}}\]]) ! | (?<=\b{_WORD}) ! )                         # 5!, n!, (a+b)!
    | (?P<hyphen>   (?<={_WORD}{_WORD}) \s* -+ \s* (?={_WORD}{_WORD}) (?!\s*(?:{_FUNCTIONS})\b)   # well-known, Tom - who
                  | (?<=[^\W_]) - (?={_WORD}{_WORD}) (?!(?:{_FUNCTIONS})\b) )      # 10-foot, x-axis
    | (?P<ratio>    (?<=\d) \s* : \s* (?=\d) )
    | (?P<dropped>  (?:[\s,;:?!'"]|\.(?!\.\.))+ )
    | (?P<blank>    _{{2,}} )
    | (?P<other>    . )
    """,
    re.VERBOSE | re.DOTALL,
)


def question_key(question: str) -> str:
    """The tokens of `question` that count, in order, separated by one space."""
    text = typography.unwrap(_DELIMITERS.sub(" ", typography.plain_latex(typography.fold(question))))
    text = _ESCAPED.sub(lambda m: m[1] or ",", text)
    tokens: list[str] = []
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match[0]
        if kind in ("dropped", "hyphen"):
            continue
        if kind == "number":
            token = token.replace(",", "")
        elif kind == "word":
            token = unicodedata.normalize("NFC", token.lower().replace("'", ""))
        elif kind == "dots":
            token = "\\dots"
        elif kind == "ratio":
            token = ":"
        elif kind == "blank":
            token = "_"
        elif kind == "command" and _FUNCTION.fullmatch(token):
            token = token[1:]  # `\sin x` is `sin x`
        tokens.append(token)
        if (
            token == "}" and len(tokens) >= 3 and tokens[-3] == "{"
        ):  # x^{2} is x^2; \frac{1}{2} stays clear from its tokens
            tokens[-3:] = [tokens[-2]]
    return " ".join(tokens)
