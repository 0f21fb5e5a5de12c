"""What a model wrote becomes a program: what is mended, what is shown, and that lines keep their numbers."""

import sys
from pathlib import Path

import pytest

from tool_sandbox import build
from tool_sandbox.image import call
from tool_sandbox.image.source import prepare


def shown(text: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    values: list[object] = []
    monkeypatch.setattr(sys, "displayhook", values.append)
    namespace: dict[str, object] = {}
    for part in prepare(text, "main.py", call_solution=True).parts:
        exec(part, namespace)
    return values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6 * 7", 42),
        ("```python\n6 * 7\n```", 42),
        ("Here it is:\n```py\n6 * 7\n```\nDone.", 42),
        ("6 * 7\n```", 42),
        ("  6 * 7 ", 42),
        ("x = 6\n    x * 7", 42),
        ("x\u00a0=\u00a042\nx", 42),
        ("\ufeff42", 42),
        ("%matplotlib inline\n42", 42),
        ("if True:\n    !pip install -q sklearn numpy==1.0\n42", 42),
        ("if True:\n    %matplotlib inline\n42", 42),
        (">>> x = 6\n>>> for i in range(7):\n...     x += 6\n6\n>>> x - 6\n42", 42),
        ("python\n42", 42),
        ("“it’s” + ‘ 42’", "it's 42".replace("'", "’")),
        ('“say "hi"”', 'say "hi"'),
        ("“(” + '“（'", "(“（"),
        ("（４４ − ２）", 42),
        ("def solution():\n    return 42", 42),
    ],
)
def test_the_value_is_shown(text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pip", raising=False)
    monkeypatch.syspath_prepend(build.SOURCES / "extras")  # the pip that an image has
    assert shown(text, monkeypatch) == [value]


@pytest.mark.parametrize("text", ["42;", "x = 42", "import sys\nsys.stderr.write('')"])
def test_no_value_is_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(text, monkeypatch) == []


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("x = 1\n!ls", 2, "not IPython"),
        ("%%bash\nls", 1, "not IPython"),
        ("```python\nx = (\n```", 2, "never closed"),
        ("for i in x\n    i", 1, "expected ':'"),
    ],
)
def test_what_cannot_be_mended(text: str, line: int, reason: str) -> None:
    with pytest.raises(SyntaxError, match=reason) as error:
        prepare(text, "main.py")
    assert error.value.lineno == line
    assert error.value.__context__ is None  # one traceback is shown, not those of what was tried


def test_what_was_mended_is_what_a_traceback_shows() -> None:
    program = prepare("Look:\n```python\nx = 1\nx / 0\n```", "main.py")
    assert program.text.split("\n") == ["", "", "x = 1", "x / 0", ""]


def test_text_that_is_too_deep_for_the_parser_is_not_called_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's parser raises MemoryError for it, without a word."""
    assert call.execute("eval('-' * 200_000 + '1')", str(tmp_path / "main.py"), {"__name__": "__main__"}) == 1
    assert "nested too deeply for Python's parser; it is not the memory limit" in capsys.readouterr().err
