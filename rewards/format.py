"""Decides whether a trajectory is well-formed."""

from dataclasses import dataclass

from trajectory import markup


@dataclass(frozen=True, slots=True)
class FormatResult:
    ok: bool
    problems: tuple[markup.Rule, ...]  # the broken rules; empty exactly if ok


def check(text: str) -> FormatResult:
    """Check a response, including tool results, against the grammar (see `trajectory.markup`)."""
    problems = markup.validate(text)
    return FormatResult(ok=not problems, problems=problems)
