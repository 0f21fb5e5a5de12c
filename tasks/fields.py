"""Reads the fields of a row: the question, the gold answers, the id.

A value is read if its meaning is clear. Otherwise it is refused with its place, its field and the remedy. If the text of a
Python object were taken for an answer, the model would be trained on it and could never be right.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from trajectory.markup import last_boxed
from trajectory.types import TaskKind

_HASHES = "####"
"""GSM8K's worked solutions end with this and the gold answer, on the same line or the next."""

_BARE_BOXED = re.compile(r"\\boxed\s*([^\s{}$.,]+)")  # `\boxed 2`, which occurs in some of MATH's solutions
_SURROGATE = re.compile("[\ud800-\udfff]")


_WRITTEN = re.compile(r"""\s*(\[\s*(\{\s*)?['"]|\{\s*['"][\w ]+['"]\s*:)""")
"""The beginning of a list of texts or objects, or of an object, as Python or JSON writes it. No LaTeX begins like this."""

CHOICES = ("choices", "options", "endings")
"""Names of the field with a question's choices, in different data sets."""


@dataclass(frozen=True, slots=True)
class MessageForm:
    """How a data set writes a message: the names of its fields, and the name of the user's role."""

    role: str
    content: str
    user: str


MESSAGES = (MessageForm("role", "content", "user"), MessageForm("from", "value", "human"))
"""The forms of the chat APIs and of ShareGPT."""

ALIASES = "_aliases"
"""MuSiQue's `answer_aliases` holds other answers that are right, too: a field of the answer's name with this behind it."""

LONGEST_GOLD = 500
"""Most characters of a mathematical answer. A longer text is a worked solution in which the answer isn't marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of a row, with the names that a message about it needs."""

    value: Any
    name: str  # as in the setting: `answer`, `reward_model.ground_truth`
    setting: str  # `question_field`, …
    place: str  # the file and the line or row

    def refused(self, problem: str, remedy: str) -> ValueError:
        return ValueError(f"{self.place}: the field {self.name!r} {problem}; {remedy}")


def find(row: Mapping[str, Any] | Sequence[Any], *, setting: str, name: str, place: str) -> Field:
    """The field `name` of a row: a name of its own, or a path with dots into objects and lists.

    `prompt.0.content` takes an item of a list; `answers.text` takes `text` of every object in a list.
    Raises ValueError, naming the fields that exist, if the row has no such field.
    """
    if isinstance(row, Mapping) and name in row:
        return Field(value=row[name], name=name, setting=setting, place=place)
    value: Any = row
    walked = ""
    for step in name.split("."):
        found = _step(value, step)
        if found is None:
            missing = f"there is no field {name!r}" if not walked else f"{walked!r}, {_kind(value)}, has no {step!r}"
            names = _names_within(value, walked)
            remedy = f"one of {', '.join(names)}" if names else "the field that has it"
            raise ValueError(f"{place}: {missing}; set data.{setting} to {remedy}")
        (value,) = found
        walked = f"{walked}.{step}" if walked else step
    return Field(value=value, name=name, setting=setting, place=place)


def question(field: Field) -> str:
    """The question: a text, or a list of chat messages that is one turn of the user."""
    value = field.value
    if isinstance(value, str) and _is_written_list_of_messages(value):
        raise field.refused("is a list of messages written as text", "store the list itself, or the question alone")
    for form in MESSAGES:
        if _is_list(value) and value and all(isinstance(item, Mapping) and form.role in item for item in value):
            value = _users_turn(field, value, form)
            break
    if isinstance(value, bytes):
        value = _decoded(field, value)
    if not isinstance(value, str):
        raise field.refused(f"is {_kind(value)}, not a question", _instead(field, value, "text"))
    text = _encodable(field, value).strip()
    if not text:
        raise ValueError(
            f"{field.place}: the question is empty (field {field.name!r}); "
            f"remove the task or set data.{field.setting} to the field that has it"
        )
    return text


def golds(field: Field, kind: TaskKind) -> tuple[str, ...]:
    """The gold answers as text, without repetition: the field's value, or each item of a list. Empty items are skipped."""
    values = [item for value in _listed(field.value) for item in _written_list(field, value)]
    found = (_gold(field, value, kind) for value in values if value is not None)
    texts = tuple(dict.fromkeys(text for text in found if text))
    if not texts:
        raise ValueError(
            f"{field.place}: no gold answer in the field {field.name!r}; "
            f"remove the task or set data.{field.setting} to the field that has it"
        )
    return texts


def check_choices(row: Mapping[str, Any] | Sequence[Any], question: str, answer: Field) -> None:
    """Raises ValueError for an answer that is a choice's number or letter, if the question doesn't show the choices."""
    if not isinstance(row, Mapping):
        return
    given = str(answer.value).strip()
    if not re.fullmatch(r"[A-Ja-j]|\d", given):
        return
    named, texts = next(((name, found) for name in CHOICES if (found := _choices(row.get(name)))), ("", []))
    labelled = given.isalpha() and re.search(rf"\b{given}\s*[).:}}]", question)
    is_index = given.isalpha() or int(given) <= len(texts)
    if not is_index or given in texts or labelled or all(text in question for text in texts):
        return
    raise answer.refused(
        f"is {given}, one of the choices in the field {named!r}, which the question doesn't show",
        f"write the choices into the question, or the choice's own text into {answer.name!r}",
    )


def _choices(value: Any) -> list[str]:
    """The texts of choices, which are a list, ARC's object of texts and labels, or an object with letters as names."""
    if isinstance(value, Mapping):
        labelled = all(len(str(name)) == 1 for name in value)
        value = value.get("text") or (list(value.values()) if labelled else None)
    if not _is_list(value) or not all(isinstance(text, str | int | float) for text in value):
        return []
    return [str(text).strip() for text in value]


def identity(field: Field) -> str:
    """A task's id: a text or a whole number."""
    value = field.value
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value or value == "":
        raise field.refused(
            f"is {_kind(value)}, not an id", f"set data.{field.setting} to a field of texts or whole numbers"
        )
    return _encodable(field, value) if isinstance(value, str) else _number(field, value)


def _gold(field: Field, value: Any, kind: TaskKind) -> str:
    """One gold answer as text. From a worked solution only its end is taken: after `####`, or in MATH's `\\boxed{}`."""
    text = _answer_text(field, value, kind)
    if _HASHES in text:
        lines = text.rpartition(_HASHES)[2].split("\n")
        gold = next((line.strip() for line in lines if line.strip()), "")
        if not gold:
            raise field.refused(
                f"ends with {_HASHES} and no answer behind it", "complete the solution or remove the task"
            )
        return gold
    if kind == "math" and ("\\boxed" in text or "\\fbox" in text):
        boxed = text.replace("\\fbox", "\\boxed")
        bare = _BARE_BOXED.findall(boxed)
        gold = last_boxed(boxed) or (bare[-1] if bare else "")
        if not gold:
            raise field.refused(
                "has a \\boxed that is empty or never closed", "complete the solution or remove the task"
            )
        return gold
    if kind == "math" and len(text.strip()) > LONGEST_GOLD:
        raise field.refused(
            f"is a text of {len(text.strip())} characters without {_HASHES} or \\boxed, so its answer can't be told",
            f"remove the task (proofs have none), or set data.{field.setting} to the field that has the answer alone",
        )
    return text.strip()


def _listed(value: Any) -> Sequence[Any]:
    return value if _is_list(value) else [value]


def _written_list(field: Field, value: Any) -> Sequence[Any]:
    """The texts of a list of texts that is itself written as text, in JSON or Python form, as in CSV files and some columns.

    Raises ValueError for an object, or for another kind of list of texts, that is written so."""
    if not isinstance(value, str) or not _WRITTEN.match(value):
        return [value]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        # Numpy puts no commas between items, and Python reads two adjacent texts as one.
        commas = read is json.loads or not re.search(r"""['"]\s+['"]""", value)
        if commas and isinstance(found, list) and all(isinstance(item, str) for item in found):
            return found
        break
    raise field.refused(
        f"is an object or a list written as text: {value.strip()[:60]!r}",
        "store the list itself (.jsonl and .parquet can hold one), or the answer alone",
    )


def _answer_text(field: Field, value: Any, kind: TaskKind) -> str:
    if isinstance(value, str):
        return _encodable(field, value)
    if isinstance(value, bytes):
        return _decoded(field, value)
    if isinstance(value, bool):
        if kind == "qa":
            return "yes" if value else "no"
        raise field.refused(
            f"is {_kind(value)}, not a value", 'write the answer as text or a number, or set data.kind = "qa"'
        )
    if isinstance(value, int | float | Decimal):
        return _number(field, value)
    raise field.refused(f"is {_kind(value)}, not a gold answer", _instead(field, value, "texts or numbers"))


def _number(field: Field, value: int | float | Decimal) -> str:
    """The number in plain digits: `7` for 7.0 (in a column with gaps, whole numbers are floats), `0.0000001` for 1e-07."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise field.refused(f"is {value}, not a number", "correct the value or remove the task")
    exact = Decimal(repr(value)) if isinstance(value, float) else value
    return str(int(exact)) if exact == int(exact) else format(exact, "f")


def _users_turn(field: Field, messages: Sequence[Mapping[str, Any]], form: MessageForm) -> Any:
    """The content of the only message. If that is a list of text parts, they are joined."""
    roles = [message[form.role] for message in messages]
    if roles != [form.user]:
        first = roles.index(form.user) if form.user in roles else 0
        remedy = f'set data.{field.setting} = "{field.name}.{first}.{form.content}" to take the user\'s message alone'
        if "system" in roles:
            remedy += ", and episode.system_prompt to what the system message says"
        raise field.refused(f"is a conversation of {', '.join(map(str, roles))}, not one turn of the user's", remedy)
    content = messages[0].get(form.content)
    if _is_list(content) and content and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content


def _is_written_list_of_messages(text: str) -> bool:
    """Whether a text is a list of messages as JSON or Python writes it, which is how a CSV file stores one."""
    if not re.match(r"\s*\[\s*\{", text) or "role" not in text:
        return False
    try:
        value = ast.literal_eval(text.strip().replace("\r", "").replace("\n", " "))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)


def _decoded(field: Field, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise field.refused(f"holds bytes that aren't UTF-8 ({error})", "store it as text") from error


def _encodable(field: Field, text: str) -> str:
    if (found := _SURROGATE.search(text)) is not None:
        raise field.refused(
            f"holds {found[0]!r}, half of a surrogate pair, which no tokenizer can encode", "correct the text"
        )
    return text


def _step(value: Any, step: str) -> tuple[Any] | None:
    """One step of a path, as a tuple, since the found value may be None; None if there is no such step."""
    if isinstance(value, Mapping):
        return (value[step],) if step in value else None
    if not _is_list(value):
        return None
    if step.isascii() and step.isdigit():
        return (value[int(step)],) if int(step) < len(value) else None
    if value and all(isinstance(item, Mapping) and step in item for item in value):
        return ([item[step] for item in value],)
    return None


def _names_within(value: Any, path: str) -> list[str]:
    """Names that a setting could use instead, from an object or the objects of a list."""
    objects = (
        [value]
        if isinstance(value, Mapping)
        else [v for v in value if isinstance(v, Mapping)]
        if _is_list(value)
        else []
    )
    names = sorted({str(name) for item in objects for name in item})
    return [f"{path}.{name}" if path else name for name in names]


def _instead(field: Field, value: Any, wanted: str) -> str:
    names = _names_within(value, field.name)
    return f"set data.{field.setting} to {'one of ' + ', '.join(names) if names else 'a field of ' + wanted}"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _kind(value: Any) -> str:
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int | float | Decimal):
        return f"the number {value}"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if _is_list(value) else f"a {type(value).__name__}"
