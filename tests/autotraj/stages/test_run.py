"""The whole method in one command, small, with its real parts; stopped in the middle of stage 1 and gone on with from
another machine: the run lives in S3 (moto's API over HTTP)."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import environment, s3_server, set_environment
from rich.console import Console
from tiny_run import ROOT

from autotraj.config.run import RunConfig, load, with_changes
from autotraj.errors import UserError
from autotraj.interrupt import Interrupt
from autotraj.launch import run_session
from autotraj.stages import pipeline as runs
from autotraj.stages.journal import read_journal
from autotraj.stages.resume import open_folder
from autotraj.training.supervised import Interrupted
from storage.objects import fetch
from trajectory.log import read_log
from trajectory.records import read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.docker, pytest.mark.timeout(900)]

QUESTIONS, CANDIDATES = 24, 4


def small() -> RunConfig:
    return load(
        ROOT / "examples/tiny/run.toml",
        [
            f'model="{ROOT / "examples/tiny/base"}"',
            "run_dir=s3://runs/whole",
            "data.limit=200",
            "eval.data.limit=16",
            f"synthesis.num_questions={QUESTIONS}",
            f"synthesis.num_candidates={CANDIDATES}",
            "sft.epochs=1",
            "reward_model.epochs=1",
            "reward_model.held_out=0.4",
            "reward_model.evaluate_every=1",
            "grpo.num_steps=2",
            "grpo.groups_per_step=4",
            "rollout.group_size=4",
            "online_repair.refresh_every=1",
            "online_repair.min_pairs=1",
        ],
    )


class AfterSome(Interrupt):
    """A person who presses Ctrl-C once some questions are done."""

    def __init__(self, journal: Path) -> None:
        super().__init__()
        self._journal = journal

    def __getattribute__(self, name: str) -> object:
        if name == "requested":
            return len(read_journal(object.__getattribute__(self, "_journal"))) >= 5
        return object.__getattribute__(self, name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunConfig, set[str]]]:
    """A run that was interrupted in stage 1, then completed, then asked for one more step; with the questions that were done
    before.

    The driver's disk is another one each time. The actors keep theirs, so that driver and actors share nothing but S3.
    """
    config = small()
    with s3_server("runs") as address, pytest.MonkeyPatch.context() as patch:
        set_environment(environment(address, tmp_path_factory.mktemp("one")), patch.setenv)
        open_folder(config)
        folder = config.folder
        with run_session(runs.at_its_largest(config)) as gateway:
            first = runs.Pipeline(config, gateway, Console(), AfterSome(folder / "synthesis"))
            with pytest.raises(Interrupted):
                first.run()
            first.push()
            before = {record.group.task.id for record in read_journal(folder / "synthesis")}
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("two")))
            shorter = with_changes(config, {"grpo.num_steps": 1})
            open_folder(shorter)
            runs.Pipeline(shorter, gateway, Console(), Interrupt()).run()
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("extended")))
            assert open_folder(shorter), "it is complete"
            assert not open_folder(config)
            runs.Pipeline(config, gateway, Console(), Interrupt()).run()
        # What another machine finds.
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("three")))
        fetch(config.run_dir)
        yield config, before


def test_stage_one_did_every_question_once(finished: tuple[RunConfig, set[str]]) -> None:
    config, before = finished
    folder = config.folder / "synthesis"
    ids = [record.group.task.id for record in read_journal(folder)]
    assert len(ids) == len(set(ids)) == QUESTIONS
    assert 5 <= len(before) < QUESTIONS
    assert before <= set(ids)
    summary = json.loads((folder / "synthesis.json").read_text())
    assert summary["num_candidates"] == QUESTIONS * CANDIDATES
    assert summary["num_kept"] + summary["num_to_repair"] == summary["num_candidates"]
    assert summary["num_repaired"] + summary["num_hard"] == summary["num_to_repair"]
    assert summary["num_repaired"] > 0
    sft = read_jsonl(folder / "sft.jsonl", ["messages", "source"])
    assert len(sft) == summary["num_sft"] == len({json.dumps(record["messages"]) for record in sft})
    assert summary["num_sft"] + summary["num_sft_duplicates"] == summary["num_kept"] + summary["num_repaired"]
    assert all(len(record["input_ids"]) == len(record["labels"]) for record in sft)
    pairs = read_jsonl(folder / "preferences.jsonl", ["prompt", "chosen", "rejected"])
    assert len(pairs) == summary["num_pairs"] == summary["num_repaired"] - summary["num_pair_duplicates"]
    assert len(read_jsonl(folder / "hard.jsonl", ["reasons"])) == summary["num_hard"]


def test_repairs_hold_results_of_real_tools_only(finished: tuple[RunConfig, set[str]]) -> None:
    config, _ = finished
    records = read_journal(config.folder / "synthesis")
    accepted = [r.accepted for record in records for r in record.repairs if r.accepted]
    for trajectory in accepted:
        outputs = [turn.tool_result.output.strip() for turn in trajectory.turns if turn.tool_result]
        shown = re.findall(r"<result>\n(.*?)\n</result>", trajectory.text, re.DOTALL)
        assert shown == outputs
        assert not trajectory.segments  # no policy sampled it on this prompt: nothing to train by policy gradient


def test_every_stage_left_what_the_next_and_a_person_need(finished: tuple[RunConfig, set[str]]) -> None:
    config, _ = finished
    folder = config.folder
    assert (folder / "sft/policy/model.safetensors").is_file()
    assert (folder / "reward_model/model/model.safetensors").is_file()
    assert (folder / "grpo/policy/model.safetensors").is_file()
    summary = json.loads((folder / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["base", "sft", "grpo"]
    for stage in summary["stages"]:
        assert stage["num_problems"] == 16
        assert stage["mean_reward"] == pytest.approx(sum(stage["reward_parts"].values()), abs=2e-3)
        assert list(read_log(folder / f"samples/{stage['name']}.log"))
    page = (folder / "report.html").read_text()
    assert "grpo" in page.lower()


def test_grpo_scored_with_the_reward_model_and_refreshed_it(finished: tuple[RunConfig, set[str]]) -> None:
    config, _ = finished
    folder = config.folder / "grpo"
    groups = list(read_log(folder / "trajectories.log"))
    assert len({group.lease_id for group in groups}) == len(groups) >= 2 * 4
    assert all(group.metrics["reward_model_version"] >= 1 for group in groups)
    assert any(reward.parts["trajectory"] != 0 for group in groups for reward in group.rewards)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in metrics] == [1, 2], "the second step was asked for when the run was done"
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"step-000001", "step-000002"}
    assert metrics[-1]["repair/groups_offered"] > 0
    assert metrics[-1]["sync/logprob_diff_max"] <= 1e-4
    assert metrics[-1]["sync/tensors_unchecked"] == 0
    assert 0 < metrics[-1]["sync/changed_share"] <= 1


def test_the_reward_model_loads_in_plain_transformers(finished: tuple[RunConfig, set[str]]) -> None:
    from transformers import AutoModelForSequenceClassification

    config, _ = finished
    model = AutoModelForSequenceClassification.from_pretrained(config.folder / "reward_model/model")
    assert model.config.num_labels == 1


def test_other_settings_in_the_same_folder_are_refused(finished: tuple[RunConfig, set[str]]) -> None:
    config, _ = finished
    with pytest.raises(UserError, match="other settings"):
        open_folder(config.model_copy(update={"seed": 1}))
