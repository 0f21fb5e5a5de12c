"""Whatever can be found wrong before an engine starts, each with its setting and remedy."""

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, tiny

from autotraj import preflight
from autotraj.__main__ import main
from autotraj.errors import UserError
from autotraj.run_folder import RunFolder, latest_checkpoint
from autotraj.sandbox import sandbox_session


def fails(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        preflight.check(tiny(tmp_path, *overrides))
    return str(caught.value)


def test_missing_model(tmp_path: Path) -> None:
    assert "model: no Hugging Face checkpoint at nowhere" in fails(tmp_path, "model=nowhere")


def test_model_without_weights(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "examples/tiny/base", model)
    (model / "model.safetensors").unlink()
    assert "holds no *.safetensors" in fails(tmp_path, f'model="{model}"')


def test_context_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    assert "engine.max_model_len = 1000000 exceeds" in fails(tmp_path, "engine.max_model_len=1000000")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no tasks"),
        ('{"question": "2+2?"}\n', "answer"),
        ("not json\n", "line 1"),
    ],
)
def test_unusable_data(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    assert message in fails(tmp_path, f'data.source="{path}"')


def test_missing_data(tmp_path: Path) -> None:
    assert "absent.jsonl" in fails(tmp_path, "data.source=absent.jsonl")


def test_training_on_evaluation_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"question": "What is two plus two?", "answer": "4"}) + "\n")
    message = fails(tmp_path, f'data.source="{path}"', f'eval.data.source="{path}"')
    assert "two plus two" in message


def test_no_docker_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    message = fails(tmp_path)
    assert "no Docker engine is reachable" in message
    assert "make setup" in message


def test_no_image(tmp_path: Path) -> None:
    message = fails(tmp_path, 'sandbox.image="nobody/has:this"')
    assert "nobody/has:this is not there" in message


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = tiny(tmp_path, f'sandbox.address="127.0.0.1:{port}"', "sandbox.num_containers=1")
        with pytest.raises(UserError, match=str(port)), sandbox_session(config):
            pass


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    message = fails(tmp_path)
    assert message.startswith("memory: this run needs about")
    assert "rollout.num_actors" in message


def test_errors_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", "--config", "examples/tiny/grpo.toml", "grpo.num_stepz=3"]) == 2
    assert capsys.readouterr().err == "error: grpo.num_stepz: unknown key; did you mean 'grpo.num_steps'?\n"


def test_a_run_folder_with_checkpoints_is_not_started_over(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    with RunFolder.create(config) as folder:
        for step in (1, 2, 3):
            folder.checkpoint(step, lambda path, _: (path / "state").write_text("x"), keep=2)
    checkpoints = Path(config.run_dir) / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000002", "step-000003"]
    with pytest.raises(UserError, match="already holds checkpoints"):
        RunFolder.create(config)
    # what a crash in the middle of saving leaves behind is never taken for a checkpoint
    (checkpoints / ".step-000009.partial").mkdir()
    assert latest_checkpoint(Path(config.run_dir)) == checkpoints / "step-000003"


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run with a checkpoint there"):
        RunFolder.resume(str(tmp_path))
