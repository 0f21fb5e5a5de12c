"""What a field's value means, in the shapes that public data sets have; all else is refused with its place and remedy."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trajectory.task_config import TaskConfig
from trajectory.tasks import load_tasks


def load(path: Path, rows: list[dict[str, Any]], **settings: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Questions and golds of `rows`, written as JSON lines and as Parquet, which must agree."""
    source = path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows))
    tasks = load_tasks(TaskConfig(source=str(source), **settings))
    pq.write_table(pa.Table.from_pylist(rows), path / "rows.parquet")
    assert load_tasks(TaskConfig(source=str(path / "rows.parquet"), **settings)) == tasks
    return [(task.question, task.golds) for task in tasks]


PUBLIC: dict[str, tuple[dict[str, Any], dict[str, str], tuple[str, ...]]] = {
    # A row of the data set's shape, the settings that read it, its gold answers.
    "gsm8k": ({"question": "Q?", "answer": "She has 3*6=<<3*6=18>>18.\n#### 18"}, {}, ("18",)),
    "gsm8k, its gold on the next line": ({"question": "Q?", "answer": "She has 18.\n####\n18\n"}, {}, ("18",)),
    "math": (
        {
            "problem": "Q?",
            "level": "Level 5",
            "type": "Algebra",
            "solution": "So $x = \\boxed{\\frac{1}{2}}$ or $\\boxed{2}$.",
        },
        {"question_field": "problem", "answer_field": "solution"},
        ("2",),
    ),
    "math, without braces": ({"question": "Q?", "answer": "Hence $\\boxed 7$."}, {}, ("7",)),
    "math, framed": ({"question": "Q?", "answer": "Hence $\\fbox{7}$."}, {}, ("7",)),
    "math-500": (
        {"problem": "Q?", "answer": "\\left( 3, 4 \\right)"},
        {"question_field": "problem"},
        ("\\left( 3, 4 \\right)",),
    ),
    "hotpotqa": (
        {"id": "5a8b", "question": "Q?", "answer": "yes", "supporting_facts": {"title": ["A"], "sent_id": [0]}},
        {"kind": "qa"},
        ("yes",),
    ),
    "squad of a hub": (
        {"question": "Q?", "answers": {"text": ["Paris", "in Paris", "Paris"], "answer_start": [3, 0, 3]}},
        {"answer_field": "answers.text", "kind": "qa"},
        ("Paris", "in Paris"),
    ),
    "squad of its own file": (
        {"question": "Q?", "answers": [{"text": "Paris", "answer_start": 3}, {"text": "in Paris", "answer_start": 0}]},
        {"answer_field": "answers.text", "kind": "qa"},
        ("Paris", "in Paris"),
    ),
    "triviaqa": (
        {
            "question": "Q?",
            "answer": {"value": "Paris", "aliases": ["Paris", "City of Light"], "type": "WikipediaEntity"},
        },
        {"answer_field": "answer.aliases", "kind": "qa"},
        ("Paris", "City of Light"),
    ),
    "triviaqa, one": (
        {"question": "Q?", "answer": {"value": "Paris", "aliases": []}},
        {"answer_field": "answer.value", "kind": "qa"},
        ("Paris",),
    ),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": "Q?"}],
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": 0, "question": "Q?"},
        },
        {"question_field": "prompt", "answer_field": "reward_model.ground_truth"},
        ("4",),
    ),
    "verl, by a path": (
        {
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}],
            "reward_model": {"ground_truth": ["4", "5"]},
        },
        {"question_field": "prompt.1.content", "answer_field": "reward_model.ground_truth"},
        ("4", "5"),
    ),
    "trl": ({"prompt": [{"role": "user", "content": "Q?"}], "answer": 4}, {"question_field": "prompt"}, ("4",)),
    "parts of a message": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]}],
            "answer": 4,
        },
        {"question_field": "prompt"},
        ("4",),
    ),
    "a name with a dot": (
        {"question": "Q?", "reward.truth": "4", "reward": {"truth": "5"}},
        {"answer_field": "reward.truth"},
        ("4",),
    ),
    "boolq": ({"question": "Q?", "answer": True}, {"kind": "qa"}, ("yes",)),
    "a float that was an integer": ({"question": "Q?", "answer": 72.0}, {}, ("72",)),
    "a small float": ({"question": "Q?", "answer": 1.25e-7}, {}, ("0.000000125",)),
    "musique": ({"question": "Q?", "answer": "Paris", "answer_aliases": []}, {"kind": "qa"}, ("Paris",)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_rows_of_public_data_sets(tmp_path: Path, name: str) -> None:
    row, settings, golds = PUBLIC[name]
    assert load(tmp_path, [row], **settings) == [("Q?", golds)]


def test_dapo_17k(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"content": f"Solve the following problem. {i}", "role": "user"}],
            "reward_model": {"ground_truth": str(30 + i), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"a-{i}"},
        }
        for i in (4, 5)
    ]
    found = load(
        tmp_path, rows, question_field="prompt", answer_field="reward_model.ground_truth", id_field="extra_info.index"
    )
    assert found == [("Solve the following problem. 4", ("34",)), ("Solve the following problem. 5", ("35",))]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "null question": (
        {"question": None, "answer": "1"},
        {},
        r"'question' is empty \(null\), not a question; set data\.question_field",
    ),
    "numeric question": ({"question": 5, "answer": "1"}, {}, r"'question' is the number 5, not a question"),
    "list of questions": ({"question": ["Q?"], "answer": "1"}, {}, r"'question' is a list, not a question"),
    "a system message": (
        {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}], "answer": 1},
        {"question_field": "prompt"},
        r"'prompt' is a conversation of system, user, not one turn.*\"prompt\.1\.content\".*episode\.system_prompt",
    ),
    "an answered conversation": (
        {"prompt": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}], "answer": 1},
        {"question_field": "prompt"},
        r"conversation of user, assistant.*prompt\.0\.content",
    ),
    "a message": (
        {"prompt": {"role": "user", "content": "Q?"}, "answer": 1},
        {"question_field": "prompt"},
        r"'prompt' is an object, not a question; set data\.question_field to one of prompt\.content, prompt\.role",
    ),
    "messages as text": (
        {"prompt": "[{'role': 'user', 'content': 'Q?'}]", "answer": 1},
        {"question_field": "prompt"},
        r"list of messages written as text",
    ),
    "a message with an image": (
        {
            "prompt": [{"role": "user", "content": [{"type": "image", "text": ""}, {"type": "text", "text": "Q?"}]}],
            "answer": 1,
        },
        {"question_field": "prompt"},
        r"'prompt' is a list, not a question",
    ),
    "verl's struct": (
        {"question": "Q?", "reward_model": {"ground_truth": "4", "style": "rule"}},
        {"answer_field": "reward_model"},
        r"'reward_model' is an object, not a gold answer; .* one of reward_model\.ground_truth, reward_model\.style",
    ),
    "triviaqa's struct": (
        {"question": "Q?", "answer": {"value": "Paris", "aliases": ["Paris"]}},
        {},
        r"'answer' is an object, not a gold answer; set data\.answer_field to one of answer\.aliases, answer\.value",
    ),
    "squad's struct": (
        {"question": "Q?", "answers": [{"text": "Paris", "answer_start": 3}]},
        {"answer_field": "answers"},
        r"'answers' is an object, not a gold answer; set data\.answer_field to one of answers\.answer_start, answers\.text",
    ),
    "a list of lists": (
        {"question": "Q?", "answer": [["a", "b"], ["c"]]},
        {},
        r"'answer' is a list, not a gold answer",
    ),
    "a path that ends early": (
        {"question": "Q?", "reward_model": {"truth": "4"}},
        {"answer_field": "reward_model.ground_truth"},
        r"'reward_model', an object, has no 'ground_truth'; set data\.answer_field to one of reward_model\.truth",
    ),
    "a path into text": (
        {"question": "Q?", "answer": "4"},
        {"answer_field": "answer.value"},
        r"'answer', a text, has no 'value'",
    ),
    "null": ({"question": "Q?", "answer": None}, {}, r"no gold answer in the field 'answer'"),
    "blank": ({"question": "Q?", "answer": " \n"}, {}, r"no gold answer in the field 'answer'"),
    "not a number": ({"question": "Q?", "answer": float("nan")}, {}, r"'answer' is nan, not a number"),
    "infinite": ({"question": "Q?", "answer": [1, float("-inf")]}, {}, r"'answer' is -inf, not a number"),
    "true for math": ({"question": "Q?", "answer": True}, {}, r"'answer' is true, not a value.*data\.kind = \"qa\""),
    "hashes without a gold": ({"question": "Q?", "answer": "work\n#### \n"}, {}, r"ends with #### and no answer"),
    "an empty box": ({"question": "Q?", "answer": "so $\\boxed{}$"}, {}, r"\\boxed that is empty or never closed"),
    "an id that is none": (
        {"question": "Q?", "answer": 1, "n": None},
        {"id_field": "n"},
        r"'n' is empty \(null\), not an id",
    ),
    "an id that is a truth": ({"question": "Q?", "answer": 1, "n": True}, {"id_field": "n"}, r"'n' is true, not an id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_plain_meaning_is_refused(tmp_path: Path, name: str) -> None:
    row, settings, message = REFUSED[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1: .*{message}"):
        load_tasks(TaskConfig(source=str(path), **settings))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=rf"rows\.parquet, row 1: .*{message}"):
        load_tasks(TaskConfig(source=str(tmp_path / "rows.parquet"), **settings))


def parquet(path: Path, column: Any) -> TaskConfig:
    pq.write_table(pa.table({"question": ["a", "b"], "answer": column}), path / "rows.parquet")
    return TaskConfig(source=str(path / "rows.parquet"))


def test_types_that_only_parquet_has(tmp_path: Path) -> None:
    tasks = load_tasks(parquet(tmp_path, pa.array([b"5", "\u00bd".encode()], pa.binary())))
    assert [task.golds for task in tasks] == [("5",), ("\u00bd",)]
    tasks = load_tasks(parquet(tmp_path, pa.array([Decimal("1.50"), Decimal("7.00")], pa.decimal128(5, 2))))
    assert [task.golds for task in tasks] == [("1.50",), ("7",)]
    tasks = load_tasks(parquet(tmp_path, pa.array(["5", "6"]).dictionary_encode()))
    assert [task.golds for task in tasks] == [("5",), ("6",)]
    with pytest.raises(ValueError, match=r"row 2: the field 'answer' holds bytes that aren't UTF-8"):
        load_tasks(parquet(tmp_path, pa.array([b"5", b"\xff"], pa.binary())))
    with pytest.raises(ValueError, match=r"row 1: the field 'answer' is a date, not a gold answer"):
        load_tasks(parquet(tmp_path, pa.array([datetime.date(2026, 1, 2)] * 2)))


def test_half_a_surrogate_pair_is_found_here_and_not_in_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row in ('{"question": "a\\ud83d", "answer": "1"}', '{"question": "a", "answer": "\\ud83d"}'):
        path.write_text(row)
        with pytest.raises(ValueError, match=r"line 1: .*half of a surrogate pair"):
            load_tasks(TaskConfig(source=str(path)))


def test_a_csv_file_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('question,answer\nQ1?,4\n"[{""role"": ""user"", ""content"": ""Q2?""}]",5\n')
    source = f"hf:{tmp_path}"
    assert load_tasks(TaskConfig(source=source, limit=1))[0].golds == ("4",)
    with pytest.raises(ValueError, match=r"row 2: .*written as text"):
        load_tasks(TaskConfig(source=source))
    with pytest.raises(ValueError, match=r"'hf:' and .* a folder of \.csv"):
        load_tasks(TaskConfig(source=str(tmp_path / "rows.csv")))
