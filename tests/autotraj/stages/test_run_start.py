"""What `run` does with a folder that holds something: says that it is done, goes on, or refuses settings that don't fit."""

import json
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from tiny_run import ROOT

from autotraj.config.run import RunConfig, load, to_toml, with_changes
from autotraj.config.stage_registry import BASE_SHAPED_BY, GRPO, STAGES, SYNTHESIZE
from autotraj.errors import UserError
from autotraj.run_folder.changes import SHAPES_NOTHING
from autotraj.run_folder.folder import RunFolder
from autotraj.stages.journal import JOURNAL
from autotraj.stages.resume import is_complete, open_folder
from autotraj.training import supervised
from learners.checkpoint_format import META_FILE, kind
from storage.objects import Storage
from trajectory.log import RecordLog

ALL = ("base", "evaluate-base", "synthesize", "sft", "reward-model", "evaluate-sft", "grpo", "evaluate-grpo")


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    model = f'model="{ROOT / "examples/tiny/base"}"'
    return load(ROOT / "examples/tiny/run.toml", [model, f'run_dir="{tmp_path / "run"}"', *overrides])


def run_of(config: RunConfig, *done: str, step: int | None = None) -> None:
    """A run's folder as `run` leaves it, with `done`, and with GRPO's checkpoint of `step`."""
    open_folder(config)
    figures = {name: {"name": name} for name in done}
    if "grpo" in done:
        figures["grpo"] = {"num_steps": config.grpo.num_steps}
        (config.folder / "summary.json").write_text("{}")
    supervised.write_done(config.folder, figures)
    if step is not None:
        checkpoint(config, GRPO.folder, step)


def checkpoint(config: RunConfig, stage: str, step: int) -> None:
    def save(driver: Path, learners: Path | Storage) -> None:
        assert isinstance(learners, Path)
        learners.mkdir()
        (learners / META_FILE).write_text(json.dumps(kind(config.learner)))

    folder, _ = RunFolder.stage(config, stage)
    with folder:
        folder.checkpoint(step, save, keep=1)


def test_a_run_that_is_done_says_so_and_imports_nothing_heavy(tmp_path: Path) -> None:
    """Whatever has become of the model and of the memory that it took."""
    config = config_of(tmp_path, "grpo.num_steps=2")
    run_of(config, *ALL, step=2)
    (tmp_path / "run.toml").write_text(to_toml(config))
    words = ["run", "--config", str(tmp_path / "run.toml")]
    code = (
        "import sys\nfrom autotraj.__main__ import main\n"
        f"code = main({words!r})\n"
        "heavy = {'torch', 'ray', 'transformers', 'vllm', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'exit code {code}, imported {heavy}' if code or heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "already complete: synthesize, sft, reward-model, grpo are done in" in done.stdout
    assert "a larger grpo.num_steps" in done.stdout


def test_more_steps_open_a_run_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, "grpo.num_steps=2")
    run_of(config, *ALL, step=2)
    longer = with_changes(config, {"grpo.num_steps": 5, "learner.lr": 1e-4})
    assert not is_complete(longer)
    assert not open_folder(longer)
    assert list(supervised.read_done(config.folder)) == [name for name in ALL if name not in ("grpo", "evaluate-grpo")]
    assert load(config.folder / "config.toml") == longer
    assert not open_folder(longer), "cut off there, the same command goes on"


def test_one_stage_that_is_done_leaves_the_others_done(tmp_path: Path) -> None:
    """Also with settings that would open GRPO again."""
    config = config_of(tmp_path, "grpo.num_steps=2")
    run_of(config, *ALL, step=2)
    with pytest.raises(UserError, match="sft is done in"):
        open_folder(with_changes(config, {"grpo.num_steps": 5}), only="sft")
    assert list(supervised.read_done(config.folder)) == list(ALL)
    assert load(config.folder / "config.toml") == config


def test_fewer_steps_or_another_rate_leave_a_run_done(tmp_path: Path) -> None:
    config = config_of(tmp_path, "grpo.num_steps=4")
    run_of(config, *ALL, step=3)  # it ended at step 3, with nothing left to learn from
    for changes in ({}, {"grpo.num_steps": 2}, {"learner.lr": 1e-4}):
        assert open_folder(with_changes(config, changes))
        assert load(config.folder / "config.toml") == config
    assert not open_folder(with_changes(config, {"grpo.num_steps": 6}))


def test_a_run_of_an_earlier_version_is_opened_again_too(tmp_path: Path) -> None:
    """Its list of stages doesn't say for how many steps GRPO was done."""
    config = config_of(tmp_path, "grpo.num_steps=2")
    run_of(config, *ALL, step=2)
    supervised.write_done(config.folder, {name: {} for name in ALL})
    assert open_folder(config)
    assert not open_folder(with_changes(config, {"grpo.num_steps": 3}))
    assert "grpo" not in supervised.read_done(config.folder)


@pytest.mark.parametrize(
    ("done", "changes"),
    [
        (("evaluate-base",), {"eval.num_samples": 3}),
        (("evaluate-base",), {"seed": 7}),
        (("base", "synthesize"), {"synthesis.num_candidates": 3}),
        (("base", "synthesize"), {"repair.temperatures": [0.1]}),
        (("base", "synthesize"), {"quality.keep_all_from": 0.95}),
        (("base", "synthesize", "sft"), {"sft.lr": 1e-3}),
        (("base", "synthesize", "sft"), {"learner.weight_decay": 0.5}),
        (("base", "synthesize", "reward-model"), {"reward_model.margin": 0.5}),
        (ALL, {"grpo.num_steps": 50, "data.limit": 30}),
        (ALL, {"grpo.num_steps": 50, "rollout.group_size": 4}),
    ],
)
def test_what_is_done_was_made_by_its_settings(
    tmp_path: Path, done: tuple[str, ...], changes: dict[str, object]
) -> None:
    config = config_of(tmp_path)
    run_of(config, *done)
    before = (config.folder / "config.toml").read_text()
    *_, name = changes
    with pytest.raises(UserError, match=rf"^run_dir: .* holds a run with other settings \({name} = "):
        open_folder(with_changes(config, changes))
    assert (config.folder / "config.toml").read_text() == before
    assert list(supervised.read_done(config.folder)) == list(done)


@pytest.mark.parametrize(
    ("done", "changes"),
    [
        ((), {"seed": 7, "model": "elsewhere"}),
        (("base", "synthesize"), {"sft.lr": 1e-3, "learner.weight_decay": 0.5, "learner.zero_stage": 2}),
        (("base", "synthesize", "sft"), {"reward_model.margin": 0.5, "learner.micro_batch_tokens": 2048}),
        (ALL[:6], {"grpo.groups_per_step": 4, "grpo.checkpoint_every": 3, "rollout.num_actors": 2}),
    ],
)
def test_what_is_yet_to_come_may_be_done_in_another_way(
    tmp_path: Path, done: tuple[str, ...], changes: dict[str, object]
) -> None:
    config = config_of(tmp_path)
    run_of(config, *done)
    changed = with_changes(config, changes)
    assert not open_folder(changed)
    assert load(config.folder / "config.toml") == changed


@pytest.mark.parametrize("stage", ["sft", "reward_model", "grpo"])
def test_learners_that_can_not_load_a_stages_checkpoint_are_refused_at_once(tmp_path: Path, stage: str) -> None:
    config = config_of(tmp_path)
    run_of(config, "base", "synthesize")
    checkpoint(config, stage, 3)
    said = (
        r"^learner\.zero_stage: the checkpoint .*/step-000003/learner_group was written with zero_stage=0, which zero_"
    )
    with pytest.raises(UserError, match=said):
        open_folder(with_changes(config, {"learner.zero_stage": 2}))
    (config.folder / stage / "checkpoints/step-000003/learner_group" / META_FILE).write_text('{"zero_sta')
    with pytest.raises(UserError, match=rf"{META_FILE} can't be read: .*This checkpoint is damaged"):
        open_folder(config)


def test_a_journal_of_another_version_is_told_at_once(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_of(config)
    (config.folder / SYNTHESIZE.folder).mkdir()
    log = RecordLog(config.folder / SYNTHESIZE.folder / JOURNAL)
    log.append_bytes(msgpack.packb({"format": 0}))
    log.close()
    with pytest.raises(UserError, match=rf"{JOURNAL} can't be continued: .*its format is 0.*choose another run_dir"):
        open_folder(config)


def test_the_list_names_settings_that_there_are(tmp_path: Path) -> None:
    """A setting that was renamed would be free to change."""
    config = config_of(tmp_path)
    own = with_changes(
        config,
        {
            "repair.engine": {"model": "x"},
            "repair.endpoint": {"base_url": "http://x", "model": "x"},
            "learner.lora": {"rank": 3},
        },
    )
    known = {f"{key} " for key in _keys(own.model_dump(), "")}
    for prefix in {
        *BASE_SHAPED_BY,
        *SHAPES_NOTHING,
        *(prefix for stage in STAGES.values() for prefix in stage.shaped_by),
    }:
        assert any(key.startswith(prefix) for key in known), prefix


def _keys(section: dict[str, object], above: str) -> set[str]:
    found = set()
    for key, value in section.items():
        found |= _keys(value, f"{above}{key}.") | {above + key} if isinstance(value, dict) else {above + key}
    return found
