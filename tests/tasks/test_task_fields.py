"""What a field's value means, in the shapes that public data sets have; all else is refused with its place and remedy."""

import datetime
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.config import TaskConfig
from tasks.load import load_tasks


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
    for source in (f"hf:{tmp_path}", str(tmp_path / "rows.csv")):
        assert load_tasks(TaskConfig(source=source, limit=1))[0].golds == ("4",)
        with pytest.raises(ValueError, match=r"row 2.*: .*written as text"):
            load_tasks(TaskConfig(source=source))


FILES: dict[str, tuple[str, str, dict[str, str], tuple[str, ...]]] = {
    # A file's name, its text as such data sets are published, the settings that read it, its gold answers.
    "hotpotqa": (
        "hotpot_dev.json",
        '[{"_id": "5a8b", "question": "Q?", "answer": "yes", "supporting_facts": [["A", 0]], "context": [["A", ["s"]]]}]',
        {"kind": "qa", "id_field": "_id"},
        ("yes",),
    ),
    "2wikimultihop": (
        "dev.json",
        '[\n{"_id": "8813", "type": "comparison", "question": "Q?", "context": [], "answer": "no"}\n]\n',
        {"kind": "qa"},
        ("no",),
    ),
    "nq-open": ("NQ-open.dev.jsonl", '{"question": "Q?", "answer": ["Ullr", "Ull"]}\n', {"kind": "qa"}, ("Ullr", "Ull")),
    "triviaqa": (
        "wikipedia-dev.json",
        '{"Data": [{"Question": "Q?", "Answer": {"Value": "Paris", "Aliases": ["Paris", "City of Light"]}}], '
        '"Domain": "Wikipedia", "Version": 1.0}',
        {"kind": "qa", "question_field": "Question", "answer_field": "Answer.Aliases"},
        ("Paris", "City of Light"),
    ),
    "orz": (
        "orz_math_57k.json",
        '[[{"from": "human", "value": "Q?"}, {"from": "assistant", "ground_truth": {"value": "36"}}]]',
        {"question_field": "0.value", "answer_field": "1.ground_truth.value"},
        ("36",),
    ),
    "sharegpt": (
        "sharegpt.json",
        '[{"id": "a", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "so $\\\\boxed{4}$"}]}]',
        {"question_field": "conversations.0.value", "answer_field": "conversations.1.value"},
        ("4",),
    ),
    "json lines that are named .json": ("train.json", '{"question": "Q?", "answer": 4}\n\n', {}, ("4",)),
    "two json lines that are named .json": (
        "train.json",
        '{"question": "Q?", "answer": 4}\n{"question": "R?", "answer": 5}\n',
        {},
        ("4",),
    ),
    "trl": (
        "train.jsonl",
        '{"prompt": [{"role": "user", "content": "Q?"}], "completion": [{"role": "assistant", "content": "#### 4"}]}',
        {"question_field": "prompt", "answer_field": "completion.content"},
        ("4",),
    ),
    "aime": (
        "aime.csv",
        "\ufeffID,Problem,Answer\r\n2024-I-1,Q?,025\r\n",
        {"question_field": "Problem", "answer_field": "Answer"},
        ("025",),
    ),
    "gpqa": (
        "gpqa_diamond.csv",
        'Question,Correct Answer,Incorrect Answer 1\n"Q?\n","10^-4 eV\n","a, b"\n',
        {"question_field": "Question", "answer_field": "Correct Answer"},
        ("10^-4 eV",),
    ),
    "popqa": (
        "popqa.tsv",
        'question\tpossible_answers\nQ?\t"[""politician"", ""political leader""]"\n',
        {"kind": "qa", "answer_field": "possible_answers"},
        ("politician", "political leader"),
    ),
    "popqa, as pandas writes lists": (
        "popqa.csv",
        "question,possible_answers\nQ?,\"['politician', \"\"people's leader\"\"]\"\n",
        {"kind": "qa", "answer_field": "possible_answers"},
        ("politician", "people's leader"),
    ),
    "skywork": (
        "math.jsonl",
        '{"prompt": [{"role": "user", "content": "Q?"}], "reward_model": {"ground_truth": "[\\"\\\\\\\\frac{1}{2}\\"]"}}',
        {"question_field": "prompt", "answer_field": "reward_model.ground_truth"},
        ("\\frac{1}{2}",),
    ),
    "openmathinstruct": (
        "train.jsonl",
        '{"problem": "Q?", "generated_solution": "so \\\\boxed{7}", "expected_answer": "7", "problem_source": "math"}',
        {"question_field": "problem", "answer_field": "expected_answer"},
        ("7",),
    ),
    "numinamath-tir": (
        "train.jsonl",
        '{"problem": "Q?", "solution": "```python\\nprint(4)\\n```\\n```output\\n4\\n```\\nHence $\\\\boxed{4}$."}',
        {"question_field": "problem", "answer_field": "solution"},
        ("4",),
    ),
    "deepscaler": (
        "deepscaler.json",
        '[{"problem": "Q?", "answer": "-\\\\frac{2}{3}", "solution": "1. Recall $\\\\boxed{-\\\\frac{2}{3}}$"}]',
        {"question_field": "problem"},
        ("-\\frac{2}{3}",),
    ),
    "letters of choices that the question shows": (
        "train.jsonl",
        '{"question": "Which? (A) 21 (B) 22", "options": ["21 km", "22 km"], "answer": "B"}',
        {"kind": "qa"},
        ("B",),
    ),
    "options that are no choices": (
        "train.jsonl",
        '{"question": "Q?", "options": {"difficulty": 3, "unit": "km"}, "answer": "7"}',
        {},
        ("7",),
    ),
    "a choice's own text": (
        "train.jsonl",
        '{"question": "Q?", "choices": ["4", "5"], "answer": "4"}',
        {"kind": "qa"},
        ("4",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("name", FILES)
def test_files_as_data_sets_publish_them(tmp_path: Path, name: str, zipped: bool) -> None:
    file, text, settings, golds = FILES[name]
    path = tmp_path / (file + (".gz" if zipped else ""))
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    first = load_tasks(TaskConfig(source=str(path), **settings))[0]  # type: ignore[arg-type]
    assert first.golds == golds
    assert first.question == "Q?" or "(A)" in first.question


MISREAD: dict[str, tuple[str, str, dict[str, str], str]] = {
    "sharegpt": (
        "a.json",
        '[{"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]}]',
        {"question_field": "conversations"},
        r"a\.json, item 1: .*conversation of human, gpt.*\"conversations\.0\.value\"",
    ),
    "squad's own file": (
        "a.json",
        '{"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "C", "qas": []}]}]}',
        {},
        r"item 1 of 'data': there is no field 'question'; set data\.question_field to one of paragraphs, title",
    ),
    "toolbench": (
        "a.json",
        '[{"query_id": 1, "query": "Q?", "api_list": [], "relevant APIs": []}]',
        {"question_field": "query"},
        r"no field 'answer'; set data\.answer_field to one of api_list, query, query_id, relevant APIs",
    ),
    "two lists": ("a.json", '{"a": [{"q": 1}], "b": [{"q": 2}]}', {}, r"an object with 2 lists of objects"),
    "a number": ("a.json", "5", {}, r"a int; a \.json file is one list of objects"),
    "json that breaks off": ("a.json", '[{"question": "Q?"', {}, r"a\.json: not valid JSON"),
    "a list of texts": ("a.json", '["Q?"]', {}, r"item 1: a str, not an object with fields"),
    "mmlu": (
        "a.jsonl",
        '{"question": "Q?", "choices": ["London", "Paris"], "answer": 1}',
        {"kind": "qa"},
        r"'answer' is 1, one of the choices in the field 'choices', which the question doesn't show",
    ),
    "arc": (
        "a.jsonl",
        '{"question": "Q?", "choices": {"text": ["London", "Paris"], "label": ["A", "B"]}, "answerKey": "B"}',
        {"kind": "qa", "answer_field": "answerKey"},
        r"'answerKey' is B, one of the choices in the field 'choices'",
    ),
    "medqa": (
        "a.jsonl",
        '{"question": "Q?", "options": {"A": "aspirin", "B": "ibuprofen"}, "answer_idx": "B"}',
        {"kind": "qa", "answer_field": "answer_idx"},
        r"'answer_idx' is B, one of the choices in the field 'options'",
    ),
    "aqua-rat": (
        "a.jsonl",
        '{"question": "Q?", "options": ["A)21", "B)21.5"], "rationale": "r", "correct": "B"}',
        {"answer_field": "correct"},
        r"'correct' is B, one of the choices in the field 'options'",
    ),
    "a proof": (
        "a.jsonl",
        json.dumps({"problem": "Q?", "solution": "Suppose that it is not so. " * 30}),
        {"question_field": "problem", "answer_field": "solution"},
        r"is a text of 809 characters without #### or \\boxed, so its answer can't be told; remove the task",
    ),
    "numpy's list in CSV": (
        "a.csv",
        "question,answer\nQ?,\"['Paris' 'City of Light']\"\n",
        {"kind": "qa"},
        r"'answer' is an object or a list written as text: \"\['Paris' 'City",
    ),
    "squad's struct in CSV": (
        "a.csv",
        "question,answers\nQ?,\"{'text': ['Paris'], 'answer_start': [1]}\"\n",
        {"kind": "qa", "answer_field": "answers"},
        r"'answers' is an object or a list written as text",
    ),
    "a comma without quotes": (
        "a.csv",
        "question,answer\nQ, R?,4\n",
        {},
        r"row 1 \(up to line 2\): it has more fields",
    ),
    "a missing comma": ("a.csv", "question,answer\nQ?,4\nR?\n", {}, r"row 2 \(up to line 3\): it has fewer fields"),
    "a quote that never ends": ("a.csv", 'question,answer\n"Q?,4\n', {}, r"not readable CSV after row 0"),
    "half a gzip": ("a.csv.gz", "question,answer", {}, r"is not a whole gzip file"),
}


@pytest.mark.parametrize("name", MISREAD)
def test_files_that_would_be_misread_are_refused(tmp_path: Path, name: str) -> None:
    file, text, settings, message = MISREAD[name]
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tasks(TaskConfig(source=str(tmp_path / file), **settings))  # type: ignore[arg-type]


def test_a_file_that_was_cut_off_is_refused_where_it_ends(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f'{{"question": "Q{n}?", "answer": {n}}}\n' for n in range(5000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz' is not a whole gzip file"):
        load_tasks(TaskConfig(source=str(tmp_path / "a.jsonl.gz")))
