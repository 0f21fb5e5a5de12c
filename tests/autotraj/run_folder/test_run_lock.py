"""Two commands on one run folder, and what `grpo --resume` takes: refused or done before anything is started."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, tiny

from autotraj.cli.commands import grpo
from autotraj.config.run import load
from autotraj.errors import UserError
from autotraj.run_folder.folder import RunFolder
from autotraj.run_folder.lock import LOCK_FILE, clear, locked
from learners.checkpoint_format import META_FILE, kind
from storage.objects import Storage

HOLDER = """
import sys, time
from pathlib import Path
from autotraj.run_folder.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(30)


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path, holder) -> None:
    with (
        pytest.raises(UserError, match=f"is in use by process {holder.pid} on .*started 0 minutes ago"),
        locked(tmp_path / "run"),
    ):
        pytest.fail("two hold it")


def test_a_killed_holders_lock_is_free(tmp_path: Path, holder) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait(30)
    with locked(tmp_path / "run"):
        pass


def test_emptying_a_folder_keeps_its_lock(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file").write_text("x")
    with locked(tmp_path):
        clear(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
        with pytest.raises(UserError, match="is in use by process"), locked(tmp_path):
            pytest.fail("two hold it")


def test_every_command_that_writes_is_refused(tmp_path: Path, holder) -> None:
    with pytest.raises(UserError, match="is in use by process"):
        grpo(None, [], resume=str(tmp_path / "run"))
    command = [sys.executable, "-m", "autotraj", "demo", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr[:15]) == (2, "error: run_dir:")


def save(driver: Path, learners: Path | Storage) -> None:
    assert isinstance(learners, Path)
    learners.mkdir()
    (learners / META_FILE).write_text(json.dumps(kind(tiny(driver).learner)))


def finished(tmp_path: Path) -> str:
    """A run's folder with the checkpoint of its last step and its policy."""
    config = tiny(tmp_path, f"run_dir={tmp_path / 'run'}", "grpo.num_steps=2")
    with RunFolder.create(config) as folder:
        folder.checkpoint(2, save, keep=1)
        (folder.path / "policy").mkdir()
    return str(tmp_path / "run")


def test_overrides_of_a_resume_are_applied_and_kept(tmp_path: Path) -> None:
    run_dir = finished(tmp_path)
    folder, config, _ = RunFolder.resume(run_dir, ["grpo.num_steps=6", "learner.lr=0.5"])
    with folder:
        assert (config.grpo.num_steps, config.learner.lr) == (6, 0.5)
    assert load(Path(run_dir, "config.toml")).grpo.num_steps == 6


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=7", "the checkpoint was made with seed = 0, not 7"),
        ("data.limit=3", "the checkpoint was made with data.limit = "),
        ('run_dir="elsewhere"', "the checkpoint was made with run_dir = "),
        ("nonsense.key=1", "nonsense"),
        ("grpo.num_stepz=1", "grpo.num_steps"),
        ("learner.zero_stage=3", "learner.zero_stage: the checkpoint "),
        ("learner.weight_decay=0.1", "learner.weight_decay: the checkpoint "),
        ("learner.num_gpus_per_learner=1", "learner.dtype: the checkpoint "),
    ],
)
def test_what_a_checkpoint_depends_on_can_not_change(tmp_path: Path, override: str, said: str) -> None:
    run_dir = finished(tmp_path)
    before = Path(run_dir, "config.toml").read_text()
    with pytest.raises(UserError) as refused:
        RunFolder.resume(run_dir, [override])
    assert said in str(refused.value)
    assert Path(run_dir, "config.toml").read_text() == before


def test_a_finished_run_says_so_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grpo(None, [], resume=finished(tmp_path)) == 0
    assert "already complete: step 2 of grpo.num_steps = 2" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="leave --config out"):
        grpo("some.toml", [], resume=str(tmp_path / "run"))
    with pytest.raises(UserError, match="there is no such folder"):
        grpo(None, [], resume=str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_checkpoint_that_is_cut_short_is_named_before_anything_is_started(tmp_path: Path) -> None:
    run_dir = finished(tmp_path)
    checkpoint = Path(run_dir, "checkpoints/step-000002")
    for name in ("learner_group/learner.json", "log_sizes.json"):
        whole = (checkpoint / name).read_text()
        (checkpoint / name).write_text(whole[:-3])
        with pytest.raises(UserError, match=rf"{checkpoint / name} can't be read: .*to go on from the one before it"):
            RunFolder.resume(run_dir)
        (checkpoint / name).write_text(whole)
    with pytest.raises(UserError, match=r"autotraj_state\.msgpack can't be read"):
        grpo(None, ["grpo.num_steps=6"], resume=run_dir)
