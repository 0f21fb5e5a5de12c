"""`submit`: what it refuses before shipping anything, and what it ships."""

import subprocess
import sys
from pathlib import Path

import pytest

from autotraj.__main__ import main
from autotraj.cli import submit
from autotraj.cli.parser import parser
from autotraj.errors import UserError

TINY = "examples/tiny/run.toml"
ROOT = Path(__file__).resolve().parents[3]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words]) == 2
    return capsys.readouterr().err


def test_results_within_the_working_directory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    said = refused(capsys, "--", "run", "--config", TINY)
    assert "run_dir = runs/tiny is within the job's working directory" in said
    assert "/shared/runs/tiny" in said
    assert "--resume = runs/x" in refused(capsys, "--", "grpo", "--resume", "runs/x")


def test_results_at_a_uri(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    words = ["grpo", "--config", "examples/tiny/grpo.toml", "run_dir=s3://bucket/runs/tiny?region=eu-west-1"]
    config = submit.check(words, None)
    assert submit.resume_words(words, config) == ["grpo", "--resume", "s3://bucket/runs/tiny?region=eu-west-1"]
    submit.check(["grpo", "--resume", "s3://bucket/runs/tiny"], None)
    assert "credentials don't belong in a URI" in refused(
        capsys, "--", *words[:3], "run_dir=s3://key:secret@bucket/runs"
    )


def test_a_mistake_in_the_configuration(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = refused(capsys, "--", "run", "--config", TINY, "run_dir=/shared/x", "grpo.num_step=3")
    assert "grpo.num_step: unknown key; did you mean 'grpo.num_steps'?" in said


def test_what_no_node_type_offers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["run", "--config", TINY, "run_dir=/shared/x", "place_by_role=true", "rollout.num_actors=9"]
    said = refused(capsys, "--cluster-file", "cluster/fake.yaml", "--", *words)
    assert "engines (rollout.num_actors, elastic.max_actors): 9 × 1 CPU, rollout asked for" in said


@pytest.mark.parametrize("words", [[], ["--follow", "a", "--stop", "b"]])
def test_one_thing_at_a_time(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert "one of a command" in refused(capsys, *words)


def test_a_command_that_is_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'demo' can't run as a job" in refused(capsys, "--", "demo")


def test_environment_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    assert submit.environment(["A=1=2", "SECRET"]) == {"A": "1=2", "SECRET": "s"}
    with pytest.raises(UserError, match="--env ABSENT_HERE: it isn't set here"):
        submit.environment(["ABSENT_HERE"])


def test_a_resumed_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = parser().parse_args(["submit", "--", "grpo", "--config", "examples/tiny/grpo.toml", "run_dir=/shared/x"])
    words = args.words[1:]
    config = submit.check(words, None)
    assert submit.resume_words(words, config) == ["grpo", "--resume", "/shared/x"]
    job = submit.job_of(words, config, args)
    assert job["metadata"]["run_dir"] == "/shared/x"
    assert job["metadata"]["job_name"].endswith(" x")
    assert job["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    run = ["run", "--config", TINY, "run_dir=/shared/x"]
    assert submit.resume_words(run, submit.check(run, None)) == run


def test_a_job_names_its_code(tmp_path: Path) -> None:
    assert submit.commit_of(tmp_path) == ""

    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, timeout=60)

    git("init")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-m", "one")
    commit = submit.commit_of(tmp_path)
    assert len(commit) == 12
    (tmp_path / "a.py").write_text("2\n")
    assert submit.commit_of(tmp_path) == f"{commit}, with changes"


def test_grpo_alone_asks_no_place_for_a_reward_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four engines take all rollout nodes of the fake cluster; `run` would need one more."""
    monkeypatch.chdir(ROOT)
    words = ["--config", "examples/tiny/grpo.toml", "run_dir=/shared/x", "place_by_role=true", "rollout.num_actors=4"]
    assert submit.check(["grpo", *words], "cluster/fake.yaml") is not None
    said = refused(capsys, "--cluster-file", "cluster/fake.yaml", "--", "run", *words)
    assert "reward model (scorer): 1 × 1 CPU, rollout asked for" in said


def test_a_check_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    """What trains and samples is imported on the cluster, where it takes a quarter of a minute, and not here as well."""
    code = f"""
import sys
from autotraj.cli.submit import check
for command in ("grpo", "run"):
    check([command, "--config", "examples/tiny/run.toml", "run_dir={tmp_path}", "place_by_role=true"], "cluster/fake.yaml")
print([name for name in ("deepspeed", "pandas", "ray.rllib", "torch", "transformers", "vllm") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr[-1000:]
