"""From scored candidates to requests, records and files, on a question small enough to follow by hand."""

import pytest
from small_group import TASK, trajectory

from actors.repair.types import Attempt, RepairResult
from autotraj.preferences import requests
from autotraj.sampling.scoring import score_group
from autotraj.stages import journal
from autotraj.stages.journal import QuestionRecord
from rewards.config import QualityConfig, RewardConfig
from rewards.quality import Quality
from trajectory.types import Group, Task


@pytest.fixture
def group() -> Group:
    candidates = (
        trajectory(0, "Multiply.", "6"),
        trajectory(1, "Maybe I multiply, perhaps not.", "6"),
        trajectory(2, "Add.", "5"),
    )
    return score_group(Group(lease_id="l", task=TASK, trajectories=candidates), RewardConfig())


@pytest.fixture
def record(group: Group) -> QuestionRecord:
    """The second was repaired at the second attempt, the third never."""
    assessment = requests.assess(group, QualityConfig())
    good = assessment.qualities[0]
    failed = Attempt(reason="copy", quality=None, text="…", temperature=0.3, error="why")
    done = Attempt(reason="", quality=good, text="…", temperature=0.7)
    return QuestionRecord(
        group=group,
        qualities=assessment.qualities,
        kept=assessment.kept,
        repaired=assessment.to_repair,
        problems=tuple(request.problems for request in assessment.requests),
        repairs=(
            RepairResult(accepted=group.trajectories[0], quality=good, attempts=(failed, done)),
            RepairResult(accepted=None, quality=None, attempts=(failed,) * 3),
        ),
    )


def test_what_is_kept_and_what_a_repairer_is_told(group: Group) -> None:
    found = requests.assess(group, QualityConfig())
    assert (found.kept, found.to_repair) == ((0,), (1, 2))
    ideal = len(group.trajectories[0].text.split())
    assert {quality.ideal_num_words for quality in found.qualities} == {ideal}  # of the shortest correct one, for all
    doubting, wrong = found.requests
    assert (doubting.correct, wrong.correct) == (True, False)
    assert "low confidence" in doubting.problems
    assert "wrong answer" not in doubting.problems
    assert wrong.problems[0] == "wrong answer"


def test_seeds_differ_by_question_and_attempt_and_nothing_else() -> None:
    other = Task(id="b", question="?", golds=("1",))
    seeds = {requests.seed_of(s, t, a) for s in (0, 1) for t in (TASK, other) for a in (1, 2)}
    assert len(seeds) == 8
    assert requests.seed_of(0, TASK, 1) == requests.seed_of(0, TASK, 1)


def test_the_journal_gives_back_what_it_was_given(record: QuestionRecord) -> None:
    again = journal.decode(journal.encode(record))
    assert journal.encode(again) == journal.encode(record)
    assert again.repairs[0].attempts == record.repairs[0].attempts
    assert again.qualities == record.qualities
    with pytest.raises(ValueError, match="not the record of a question"):
        journal.decode(b"\x80")


def test_files_hold_each_trajectory_once(record: QuestionRecord) -> None:
    sft = journal.sft_records(record, "")
    assert [entry["source"] for entry in sft] == ["kept", "repaired"]
    (pair,) = journal.preference_records(record, "")
    assert pair["chosen"] == record.group.trajectories[0].text
    assert pair["rejected"] == record.group.trajectories[1].text
    (hard,) = journal.hard_records(record, "")
    assert hard["reasons"] == ["copy"] * 3
    assert hard["problems"][0] == "wrong answer"
    shown = journal.repair_records(record)
    assert [bool(entry["repaired"]) for entry in shown] == [True, False]


def test_counts_and_means_by_hand(record: QuestionRecord) -> None:
    found = journal.describe([record, record])
    assert found["num_questions"] == 2
    assert (found["num_candidates"], found["num_correct"], found["num_kept"]) == (6, 4, 2)
    assert (found["num_to_repair"], found["num_repaired"], found["num_hard"]) == (4, 2, 2)
    assert (found["num_attempts"], found["failed_attempts"]) == (10, {"copy": 8})
    assert found["dimensions"]["before"]["confidence"] == 0.0
    assert found["dimensions"]["after"]["confidence"] == 1.0
    quality: Quality = record.qualities[0]
    assert found["dimensions"]["kept"]["score"] == pytest.approx(quality.score, abs=1e-4)
