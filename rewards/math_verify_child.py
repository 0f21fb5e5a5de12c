"""The process behind `verifier`: one JSON request a line on stdin, one JSON verdict or error a line on stdout.

It is run as a file and imports nothing of ours. Its first line of output is "ready".
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

MEMORY_BYTES = 2 << 30

EXACT_DIGITS = 50  # for expressions without a decimal: with math-verify's 15 digits, 2^{-99} would equal 2^{-98}
FLOAT_DIGITS = 15  # a decimal has no more
RELATIVE = Fraction(1, 10**12)  # math-verify decides about two exact values that are closer than this
TOLERANCE, SMALL = Fraction(1, 10**6), Fraction(1, 10**3)  # for values with decimals, as in `outcome`


def comparison() -> Callable[[str, str], bool]:
    """A function that says whether two LaTeX texts are equal. This imports math-verify, which takes about 2 s.

    The texts are read as a whole. math-verify's own `parse` looks for an answer in a text, and takes the number out of one
    that is no formula. It also removes units, so that `2t` is 2, and converts all letters to lower case.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from latex2sympy2_extended.logic import And
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from sympy import Float, Rational, Symbol, UnevaluatedExpr
    from sympy.core.relational import Relational

    normalization = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    conversion = ConversionConfig(lowercase_symbols=False)

    @lru_cache(maxsize=64)  # the answers of a group have the same gold answer
    def read(latex: str, is_real: bool) -> Any:
        try:
            return latex2sympy(latex, is_real=is_real, normalization_config=None, conversion_config=conversion)
        except MemoryError:
            raise  # this says nothing about the text, so it isn't remembered
        except Exception:  # a parser of hostile text may raise anything; a text that it can't read equals nothing
            return None

    def apart(gold: Any, answer: Any, exact: bool) -> bool:
        """Whether both are numbers, and different ones, since math-verify calls two numbers near 0 equal."""
        if not (getattr(gold, "is_number", False) and getattr(answer, "is_number", False)):
            return False
        if gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr):  # a percentage has two values
            return False
        gold, answer = gold.doit(), answer.doit()
        if isinstance(gold, Rational) and isinstance(answer, Rational):
            return bool(gold != answer)
        try:
            size = max(abs(gold.evalf(30)), abs(answer.evalf(30)))
            allowed = RELATIVE * size if exact else TOLERANCE * (1 if size >= SMALL else size)
            return bool(abs((gold - answer).evalf(30)) > allowed)
        except TypeError:  # 0/0 can't be compared
            return False

    def is_solved(relation: Any) -> bool:
        """Whether an unknown is alone on a side: `x > 5`, and not `x - 3 > 2`, which may be the question itself."""
        if isinstance(relation, And):
            return bool(relation.args) and all(map(is_solved, relation.args))
        if not isinstance(relation, Relational):
            return False
        left, right = relation.lhs, relation.rhs
        return any(isinstance(x, Symbol) and x not in other.free_symbols for x, other in ((left, right), (right, left)))

    def equal(gold_text: str, answer_text: str) -> bool:
        texts = [normalize_latex(text, normalization) for text in (gold_text, answer_text)]
        is_real = not any(map(should_treat_as_complex, texts))
        gold, answer = (read(text, is_real) for text in texts)
        if gold is None or answer is None:
            return False
        exact = not any(hasattr(side, "has") and side.has(Float) for side in (gold, answer))
        if apart(gold, answer, exact):
            return False
        digits = EXACT_DIGITS if exact else FLOAT_DIGITS
        if is_solved(gold) and isinstance(answer, (Relational, And)) and not is_solved(answer):
            return False
        return bool(
            verify(
                gold,
                answer,
                numeric_precision=digits,
                allow_set_relation_comp=is_solved(
                    answer
                ),  # `x > 5` equals `(5, \infty)`, whichever of them is the gold
                timeout_seconds=None,
                raise_on_error=True,
            )
        )

    return equal


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    equal = comparison()
    logging.disable()  # at each call it would warn that it has no deadline of its own
    equal("\\frac{1}{2}", "x")  # builds the grammar now, not within the first deadline
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)  # output of a library must not be taken for a verdict
    os.dup2(devnull, 2)
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # If the parent is gone, nobody kills this process at the deadline. This signal does, as it has no Python handler.
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + 1)
        verdict: dict[str, bool | str]
        try:
            verdict = {"equal": equal(request["gold"], request["answer"])}
        except (Exception, MemoryError) as error:  # parsers of hostile text may raise anything
            verdict = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(verdict).encode() + b"\n")


if __name__ == "__main__":
    main()
