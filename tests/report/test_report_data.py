"""Reading a run's folder: whole, in parts, broken, or written twice."""

import json
from pathlib import Path

import pytest
from report_run import Page, group, make_run, repair, solved, write_lines, write_log

from report import page
from report.data import Missing, Repairs, load_report, read_metrics

PARTS = {
    "summary.json": "No file with the results of the stages: this run has no summary.json.",
    "synthesis/synthesis.json": "the figures of synthesis and repair: this run has no synthesis/synthesis.json.",
    "synthesis/repairs.jsonl": "No repairs to show: this run has no synthesis/repairs.jsonl.",
    "sft/metrics.jsonl": "No metrics of the SFT stage: this run has no sft/metrics.jsonl.",
    "reward_model/metrics.jsonl": "No metrics of the reward-model stage: this run has no reward_model/metrics.jsonl.",
    "reward_model/metrics.json": "this run has no reward_model/metrics.json.",
    "grpo/metrics.jsonl": "No metrics of the GRPO stage: this run has no grpo/metrics.jsonl.",
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "my-run")


@pytest.mark.parametrize("name", PARTS)
def test_a_missing_part_is_said_in_a_sentence(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    text = Page(page.write_report(run_dir).read_text(encoding="utf-8")).text
    assert PARTS[name] in text
    assert sum(sentence in text for sentence in PARTS.values()) == 1


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe{", b"[1, 2]", b'{"stages": 3, "step": "x"}', b"[" * 100_000])
def test_a_broken_part_is_no_failure(run_dir: Path, name: str, content: bytes) -> None:
    (run_dir / name).write_bytes(content)
    assert page.write_report(run_dir).is_file()


def test_an_empty_folder_has_a_report_too(tmp_path: Path) -> None:
    text = Page(page.write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "This run has no results yet." in text
    assert "No trajectories to show" in text
    assert all(sentence in text for sentence in PARTS.values())


def test_no_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        page.write_report(tmp_path / "none")


def test_what_is_wrong_with_a_file_is_said(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"stages": [{"name": "base", "accuracy": "high", "num_problems": 5}]}')
    data = load_report(run_dir)
    assert isinstance(data.summary, Missing)
    assert "stages.0.accuracy" in data.summary.why


def test_a_run_of_one_stage_has_its_files_at_the_root(run_dir: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (run_dir / "grpo/metrics.jsonl").rename(old / "metrics.jsonl")
    write_log(old / "trajectories.log", [group(solved(str(i)), question=f"question {i}") for i in range(200)])
    data = load_report(old)
    assert not isinstance(data.grpo, Missing)
    assert not isinstance(data.samples, Missing)
    assert [(s.stage, len(s.groups), s.num_left_out) for s in data.samples] == [
        ("training, start", 32, 0),
        ("training, end", 32, 136),
    ]
    assert data.samples[1].groups[-1].task.question == "question 199"


def test_a_torn_log_and_a_foreign_one(run_dir: Path) -> None:
    log = run_dir / "samples/base.log"
    log.write_bytes(log.read_bytes()[:-3])
    data = load_report(run_dir)
    assert not isinstance(data.samples, Missing)
    assert [s.stage for s in data.samples] == ["sft", "grpo"]


def test_steps_written_twice_count_once(tmp_path: Path) -> None:
    path = tmp_path / "grpo/metrics.jsonl"
    write_lines(path, [{"step": s, "loss": 1.0} for s in (1, 2, 3)])
    with path.open("a") as file:  # a resumed run begins again at 2; another line adds to it; the last one is torn
        file.write('{"step": 2, "loss": 5.0}\n{"step": 2, "held_out": 0.5}\n{"step": 3, "loss": NaN}\n{"step": 4, "lo')
    metrics = read_metrics(path, "a stage")
    assert not isinstance(metrics, Missing)
    assert (metrics["loss"].steps, metrics["loss"].values) == ((1.0, 2.0), (1.0, 5.0))
    assert metrics["held_out"].steps == (2.0,)


def test_repairs_of_both_kinds_are_kept_and_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "synthesis/repairs.jsonl", [repair("a", "b")] * 100 + [repair("a", "")] * 3 + [{"odd": 1}])
    repairs = load_report(tmp_path).repairs
    assert isinstance(repairs, Repairs)
    assert (repairs.num_repaired, repairs.num_hard, len(repairs.shown)) == (100, 3, 67)


def test_what_learners_said_of_the_model_stands_on_the_page_once(run_dir: Path) -> None:
    padded, slow = "model: sequences are padded <b>here</b>", "model: attention is slow"
    (run_dir / "sft/notes.json").write_text(json.dumps([padded]))
    (run_dir / "grpo/notes.json").write_text(json.dumps([padded, slow, 7]))
    (run_dir / "reward_model/notes.json").write_text("[")
    assert load_report(run_dir).notes == (padded, slow)
    text = Page(page.write_report(run_dir).read_text(encoding="utf-8")).text
    assert text.count(padded) == text.count(slow) == 1
