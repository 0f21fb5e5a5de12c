"""A stage of one's own, from outside the package: one record makes it known to the configuration, the command line, the
pipeline, the checks of a folder that is continued, and the report."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_run import tiny

from autotraj.cli.parser import parser
from autotraj.config.run import RunConfig, with_changes
from autotraj.config.stage_registry import STAGES, Stage, StageInput
from autotraj.errors import UserError
from autotraj.gateways.session import GatewayAccess
from autotraj.interrupt import Interrupt
from autotraj.stages.pipeline import Pipeline
from autotraj.stages.resume import is_complete, open_folder
from autotraj.training import supervised
from trajectory.records import check_sft, sft_record, write_jsonl

NOWHERE = "127.0.0.1:1"
"""No gateway is there: this stage calls no tools."""


def count(pipeline: Pipeline) -> dict[str, Any]:
    """What the stage does: it counts its input's characters, once a step."""
    folder = pipeline.path / STAGES["count"].folder
    folder.mkdir()
    text = supervised.input_of("count", pipeline.config).read_text()
    steps = [json.dumps({"step": step, "characters": step * len(text)}) for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(steps))
    (folder / "notes.json").write_text('["The characters are counted one by one."]')
    return {"num_characters": len(text)}


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(
        name="count",
        folder="counted",
        run=f"{__name__}:count",
        help="count what synthesize made",
        input=StageInput(made_by="synthesize", file="sft.jsonl", fields=("messages",), check=check_sft),
        shaped_by=("sft.include_repaired ",),
    )
    monkeypatch.setitem(STAGES, stage.name, stage)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny(tmp_path, f'gateway="{NOWHERE}"', 'stages=["synthesize", "count"]')


def after_synthesis(config: RunConfig) -> Pipeline:
    """A run whose other stages are done."""
    open_folder(config)
    folder = config.folder / "synthesis"
    folder.mkdir()
    write_jsonl(folder / "sft.jsonl", [sft_record("What is 2 times 3?", "<answer>6</answer>", "", task_id="a")])
    supervised.write_done(config.folder, {"evaluate-base": {"name": "base"}, "synthesize": {}, "base": {}})
    return Pipeline(config, GatewayAccess(NOWHERE), Console(quiet=True), Interrupt())


def test_it_is_a_command_and_a_name_in_stages(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    args = parser().parse_args(["count", "--config", "x.toml", "seed=1"])
    assert (args.command, args.handler, args.config) == ("count", "autotraj.cli.commands:stage", "x.toml")
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    assert "count what synthesize made" in capsys.readouterr().out
    assert config.stages == ("synthesize", "count")
    with pytest.raises(UserError, match=r"stages: .*'count' needs 'synthesize', which makes its input"):
        with_changes(config, {"stages": ["count"]})
    with pytest.raises(UserError, match="each once, in the order synthesize, sft, reward-model, grpo, count"):
        with_changes(config, {"stages": ["count", "synthesize"]})
    with pytest.raises(UserError, match="there is no stage 'cuont'; there are synthesize, sft, reward-model, grpo, co"):
        with_changes(config, {"stages": ["synthesize", "cuont"]})


def test_its_input_is_checked_before_it_starts(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"sft\.jsonl isn't there; make it with `python -m autotraj synthesize`"):
        supervised.check_inputs("count", config)
    after_synthesis(config)
    supervised.check_inputs("count", config)
    (config.folder / "synthesis/sft.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="line 1: no field 'messages'"):
        supervised.check_inputs("count", config)


def test_run_carries_it_out_once_records_it_and_shows_it(config: RunConfig) -> None:
    pipeline = after_synthesis(config)
    assert not is_complete(config)
    pipeline.done["evaluate-base"] |= {"accuracy": 0.5, "num_problems": 16}
    pipeline.run()
    done = supervised.read_done(config.folder)
    assert list(done) == ["evaluate-base", "synthesize", "base", "count"]
    assert done["count"]["num_characters"] > 100
    summary = json.loads((config.folder / "summary.json").read_text())
    assert summary["count"] == done["count"]
    assert summary["notes"] == ["The characters are counted one by one."]
    page = (config.folder / "report.html").read_text()
    assert "<h3>counted</h3>" in page
    assert "characters" in page[page.index("<h3>counted</h3>") :]
    assert is_complete(config)
    pipeline.only("count")  # it would fail, as its folder is there
    with pytest.raises(UserError, match="count is done in"):
        open_folder(config, only="count")


def test_what_shaped_it_can_not_change_once_it_has_begun(config: RunConfig) -> None:
    after_synthesis(config)
    other = with_changes(config, {"sft.include_repaired": False})
    open_folder(other)  # nothing was made with it yet
    open_folder(config)
    (config.folder / "counted").mkdir()
    with pytest.raises(UserError, match=r"sft\.include_repaired.*used for its base, synthesize, count"):
        open_folder(other)
