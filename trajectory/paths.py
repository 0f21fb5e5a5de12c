"""Marks the settings that are paths on this machine, and makes them absolute for a process in another working folder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic.fields import FieldInfo

from storage.locations import is_uri
from trajectory.section import Section

WORD_PROBLEMS = "word-problems"
"""Stands for the generated problems, or for their corpus, where a path to data may stand."""
HUGGING_FACE = "hf:"
"""Stands before the name of a Hugging Face data set, or before the path of a folder of its files."""


@dataclass(frozen=True, slots=True)
class IsPath:
    """Marks a field whose value is a path, unless it is one of `but`, empty or a URI. After `prefix` there may be a path or
    another kind of name."""

    but: Collection[str] = ()
    prefix: str = ""

    def absolute(self, value: str, base: Path) -> str:
        if not value or value in self.but or is_uri(value):
            return value
        if self.prefix and value.startswith(self.prefix):
            name, colon, rest = value.removeprefix(self.prefix).partition(":")
            return f"{self.prefix}{base / name}{colon}{rest}" if (base / name).exists() else value
        return str(base / value)


LocalPath = Annotated[str, IsPath()]

S = TypeVar("S", bound=Section)


def with_absolute_paths(section: S, base: Path) -> S:
    """`section` in which every relative path, also in the sections within it, is made absolute from the folder `base`."""
    changed = {
        name: _absolute(getattr(section, name), field, base) for name, field in type(section).model_fields.items()
    }
    return section.model_copy(update=changed)


def _absolute(value: Any, field: FieldInfo, base: Path) -> Any:
    if isinstance(value, Section):
        return with_absolute_paths(value, base)
    if isinstance(value, str):
        for mark in field.metadata:
            if isinstance(mark, IsPath):
                return mark.absolute(value, base)
    return value
