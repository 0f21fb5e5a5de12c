"""Loading tasks: every kind of source, and what each mistake tells its user."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.config import TaskConfig
from tasks.load import assert_disjoint, load_tasks
from trajectory.types import Task

REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def real(name):
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"needs {name} in ../shared/data beside the repository")
    return str(path)


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines):
        path = tmp_path / "tasks.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(path)

    return write


def test_jsonl_with_gsm8k_solutions(jsonl):
    source = jsonl({"question": " 2+3? ", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "", {"question": "b", "answer": 1.5})
    first, second = load_tasks(TaskConfig(source=source))
    assert (first.question, first.golds, first.kind) == ("2+3?", ("5",), "math")
    assert second.golds == ("1.5",)
    # SHA-256 of the question: the same in every process and on every machine.
    assert first.id == "19ff1076659ddfa0"


def test_fields_ids_limit_and_lists_of_golds(jsonl):
    source = jsonl(
        {"q": "a", "a": ["x", "y", "x", None, ""], "n": 3}, {"q": "b", "a": "z", "n": "k"}, {"q": "c", "a": "z", "n": 0}
    )
    config = TaskConfig(source=source, question_field="q", answer_field="a", id_field="n", kind="qa", limit=2)
    assert load_tasks(config) == [
        Task(id="3", question="a", golds=("x", "y"), kind="qa"),
        Task(id="k", question="b", golds=("z",), kind="qa"),
    ]


def test_parquet(tmp_path):
    path = tmp_path / "tasks.parquet"
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [["x", "y"], ["z"]]}), path)
    assert [t.golds for t in load_tasks(TaskConfig(source=str(path)))] == [("x", "y"), ("z",)]


def test_hugging_face_data_set(jsonl):
    folder = Path(jsonl({"question": "a", "answer": "1"}, {"question": "b", "answer": "2"})).parent
    tasks = load_tasks(TaskConfig(source=f"hf:{folder}"))
    assert [(t.question, t.golds) for t in tasks] == [("a", ("1",)), ("b", ("2",))]
    with pytest.raises(ValueError, match=r"data\.split = 'nowhere' can't be loaded"):
        load_tasks(TaskConfig(source=f"hf:{folder}", split="nowhere"))


def test_word_problems():
    train = load_tasks(TaskConfig(limit=20))
    assert len(train) == 20
    assert_disjoint(train, load_tasks(TaskConfig(split="eval", limit=20)))
    with pytest.raises(ValueError, match=r"data\.split = 'test'"):
        load_tasks(TaskConfig(split="test"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{not json"], r"line 1: not valid JSON"),
        (["[" * 100_000], r"line 1: not valid JSON"),
        (["[1]"], r"line 1: a list, not an object"),
        ([{"question": "a", "answer": "1"}, "", {"question": "b", "answer": ""}], r"line 3: no gold answer.*answer_field"),
        ([{"question": "a", "answer": []}], r"line 1: no gold answer"),
        ([{"question": "a", "answer": None}], r"line 1: no gold answer"),
        ([{"question": " ", "answer": "1"}], r"line 1: the question is empty"),
        ([{"q": "a", "answer": "1"}], r"no field 'question'; set data\.question_field to one of answer, q"),
        ([{"question": "a", "target": "1"}], r"no field 'answer'; set data\.answer_field to one of question, target"),
        ([{"question": "a", "answer": "1"}] * 2, r"line 2: the question 'a' occurs a second time; .*data\.id_field"),
        ([], r"holds no tasks"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_named(jsonl, lines, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(TaskConfig(source=jsonl(*lines)))


def test_duplicate_and_missing_ids_are_named(jsonl):
    source = jsonl({"question": "a", "answer": "1", "n": 1}, {"question": "b", "answer": "1", "n": 1})
    with pytest.raises(ValueError, match="line 2: the id '1' occurs a second time"):
        load_tasks(TaskConfig(source=source, id_field="n"))
    with pytest.raises(ValueError, match=r"no field 'uid'; set data\.id_field"):
        load_tasks(TaskConfig(source=source, id_field="uid"))


def test_sources_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_tasks(TaskConfig(source=str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="is not a source: use 'word-problems'"):
        load_tasks(TaskConfig(source="gsm8k"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="is not readable Parquet"):
        load_tasks(TaskConfig(source=str(tmp_path / "bad.parquet")))


def test_a_shared_question_is_refused_however_it_is_written():
    train = [Task(id="1", question="What is 2 + 3?", golds=("5",)), Task(id="2", question="Other", golds=("5",))]
    held_out = [Task(id="e", question="  what IS 2+3", golds=("5",))]
    with pytest.raises(ValueError, match=r"1 training tasks are in the evaluation set.*1 = e"):
        assert_disjoint(train, held_out)
    assert_disjoint(train[1:], held_out)


def test_all_of_gsm8k():
    tasks = load_tasks(TaskConfig(source=real("gsm8k_train.jsonl")))
    assert len(tasks) == 7473
    assert tasks[0].golds == ("72",)
    assert all(len(t.golds) == 1 and t.golds[0][-1].isdigit() for t in tasks)
    with pytest.raises(ValueError, match="1 training tasks"):
        assert_disjoint(tasks, tasks[:1])


def test_hotpotqa():
    tasks = load_tasks(TaskConfig(source=real("hotpotqa_200.jsonl"), kind="qa"))
    assert len(tasks) == 200
    assert tasks[0].golds == ("Frank Lowy",)


def test_aliases_of_an_answer_count_as_well(jsonl):
    """The form of MuSiQue's files."""
    rows = [
        {"question": "Which country?", "answer": "The Netherlands", "answer_aliases": ["Holland", "The Netherlands"]},
        {"question": "Which river?", "answer": "Rhine", "answer_aliases": []},
    ]
    tasks = load_tasks(TaskConfig(source=jsonl(*rows), kind="qa"))
    assert [task.golds for task in tasks] == [("The Netherlands", "Holland"), ("Rhine",)]
