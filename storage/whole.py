"""Files and folders that are there whole, or as they were before: written beside their place, and then moved into it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_of(target: Path) -> Path:
    """The hidden path, in the same folder, at which `target` is written until it is complete."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """The path to write a file or a folder to; when the block ends, it takes the place of `target`.

    If the block raises, `target` stays as it was. What was written by then stays until the next attempt, which removes it.
    """
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if partial.is_dir():  # a folder replaces only an empty one
        shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def write_whole(target: Path, text: str) -> None:
    """Write a file of `text`, in UTF-8."""
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8")
