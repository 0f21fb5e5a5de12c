"""Loads questions with gold answers from files, Hugging Face data sets, or the generator of word problems."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import cast

from tasks import fields
from tasks import rows as task_rows
from tasks.config import TaskConfig
from tasks.question_key import question_key
from tasks.word_problems import problems
from trajectory.paths import HUGGING_FACE, WORD_PROBLEMS
from trajectory.types import Task

_SETTING = re.compile(rf"(?<![\w.])data\.(?=(?:{'|'.join(TaskConfig.model_fields)})\b)")
"""Matches the name of a setting in a message, so that the section's real name can replace `data`."""


def load_tasks(config: TaskConfig, *, called: str = "data") -> list[Task]:
    """The tasks that `config` describes, in the order of their source. `called` is its section, for messages.

    Raises ValueError, naming the setting and the remedy, for a source that can't be read. It also names the line for an
    unknown field, a value that is no question, gold answer or id (see `tasks.fields`), and an id that occurs twice.
    """
    try:
        return _load(config)
    except OSError as error:
        raise ValueError(f"{called}.source = {config.source!r} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(_SETTING.sub(f"{called}.", str(error))) from error


def _load(config: TaskConfig) -> list[Task]:
    if config.source == WORD_PROBLEMS:
        return _generate(config)
    tasks: dict[str, Task] = {}
    for place, row in islice(_rows(config), config.limit):
        task = _task(row, place, config)
        if task.id in tasks:
            what = f"the id {task.id!r}" if config.id_field else f"the question {task.question[:80]!r}"
            raise ValueError(
                f"{place}: {what} occurs a second time; remove it, or set data.id_field to a field whose values differ"
            )
        tasks[task.id] = task
    if not tasks:
        raise ValueError(f"data.source = {config.source!r} holds no tasks")
    return list(tasks.values())


def assert_disjoint(train: Iterable[Task], held_out: Iterable[Task]) -> None:
    """Raises ValueError if a training question is also an evaluation question, however it is written (`question_key`)."""
    evaluated = {question_key(task.question): task for task in held_out}
    shared = [(task, evaluated[key]) for task in train if (key := question_key(task.question)) in evaluated]
    if shared:
        named = "; ".join(f"{a.id} = {b.id}: {a.question[:80]!r}" for a, b in shared[:3])
        raise ValueError(
            f"{len(shared)} training tasks are in the evaluation set, so its scores would mean nothing ({named}); "
            "set data.source or eval.data.source to data (or a split) that share no question"
        )


def _generate(config: TaskConfig) -> list[Task]:
    try:
        split = cast(problems.Split, config.split)
        return problems.generate(split, config.limit or 1000, config.seed, config.tiers)
    except ValueError as error:
        raise ValueError(f"data.split = {config.split!r}, data.limit = {config.limit}: {error}") from error


def _task(row: task_rows.Row, place: str, config: TaskConfig) -> Task:
    def field(setting: str, name: str) -> fields.Field:
        return fields.find(row, setting=setting, name=name, place=place)

    question = fields.question(field("question_field", config.question_field))
    answer = field("answer_field", config.answer_field)
    golds = fields.golds(answer, config.kind)
    if isinstance(row, Mapping) and row.get(config.answer_field + fields.ALIASES):
        golds += fields.golds(field("answer_field", config.answer_field + fields.ALIASES), config.kind)
    fields.check_choices(row, question, answer)
    if config.id_field is None:
        task_id = hashlib.sha256(question.encode()).hexdigest()[:16]
    else:
        task_id = fields.identity(field("id_field", config.id_field))
    return Task(id=task_id, question=question, golds=tuple(dict.fromkeys(golds)), kind=config.kind)


def _rows(config: TaskConfig) -> Iterator[tuple[str, task_rows.Row]]:
    """Yields each row's place, for messages, and the row."""
    if config.source.startswith(HUGGING_FACE):
        return _hugging_face(config)
    path = Path(config.source)
    if not task_rows.has_rows(path):
        raise ValueError(
            f"data.source = {config.source!r} is not a source: "
            f"use 'word-problems', a file ending in {task_rows.ENDINGS}, or 'hf:' and the name of a data set "
            "or the path of a folder of its files"
        )
    if not path.is_file():
        raise ValueError(f"data.source = {config.source!r}: there is no such file here ({Path.cwd()})")
    return task_rows.rows(path)


def _hugging_face(config: TaskConfig) -> Iterator[tuple[str, task_rows.Row]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data.source = {config.source!r} needs the package datasets: pip install datasets") from error
    name, _, subset = config.source.removeprefix(HUGGING_FACE).partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=config.split)
    except Exception as error:  # the hub, the network and the builder each raise their own kinds of errors
        raise ValueError(
            f"data.source = {config.source!r}, data.split = {config.split!r} can't be loaded: {error}; "
            "check the name ('hf:name' or 'hf:name:subset') and the split, or give a local file of its rows"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{config.source}, row {number}", row
