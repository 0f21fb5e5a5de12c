"""Is a trajectory well-formed?"""

from dataclasses import dataclass

from trajectory import markup


@dataclass(frozen=True, slots=True)
class FormatResult:
    ok: bool
    problems: tuple[markup.Rule, ...]  # the broken rules; empty exactly when ok


def check(text: str) -> FormatResult:
    """Checks a response, tool results included, against the grammar (see `trajectory.markup`)."""
    problems = markup.validate(text)
    return FormatResult(ok=not problems, problems=problems)
