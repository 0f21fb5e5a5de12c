"""Prints what notebooks show with graphics: `display(value)`, and values whose text is their source."""

from __future__ import annotations


def display(*values: object, **options: object) -> None:
    """Print each value like the value of a last expression."""
    for value in values:
        print(repr(value))


def clear_output(wait: bool = False) -> None:
    """Does nothing. Printed text stays."""


class Shown:
    """Text that a notebook would render."""

    def __init__(self, data: object = "", *arguments: object, **options: object) -> None:
        self.data = str(data)

    def __repr__(self) -> str:
        return self.data


HTML = Latex = Markdown = Math = Pretty = Shown
