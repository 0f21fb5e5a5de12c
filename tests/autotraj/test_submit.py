"""`submit`: what it refuses before shipping anything, and real jobs on a cluster of cluster/fake.yaml."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))
from fake_cluster import ROOT, FakeCluster, fake_cluster

from autotraj import submit
from autotraj.__main__ import main, parser
from autotraj.errors import UserError

TINY = "examples/tiny/run.toml"
CLIENT = """
import sys
from pathlib import Path
from cluster import jobs

address, folder, *words = sys.argv[1:]
client = jobs.connect(address)
env = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
job = jobs.submit(client, jobs.Job(" ".join(words), Path(folder), [], env, {}))
def write(text):
    print(text, end="", flush=True)
    if "STOP" in env and "running" in text: jobs.stop(client, job, 90)
if words[-1].endswith("checkpoint.txt"): env["STOP"] = "1"
ended = jobs.follow(client, job, write)
print("END", str(ended.status), jobs.exit_code(ended.status, ended.driver_exit_code))
"""


# --- refused here


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
    config = submit._check(words, None)
    assert submit.resume_words(words, config) == ["grpo", "--resume", "/shared/x"]
    job = submit.job_of(words, config, args)
    assert job.metadata["run_dir"] == "/shared/x"
    assert job.env["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    run = ["run", "--config", TINY, "run_dir=/shared/x"]
    assert submit.resume_words(run, submit._check(run, None)) == run


# --- real jobs


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with fake_cluster() as running:
        yield running


def client(cluster: FakeCluster, *words: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=cluster.client_environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.mark.ray
def test_a_command_of_ours_as_a_job(cluster: FakeCluster) -> None:
    words = ["-m", "autotraj", "submit", "--address", cluster.dashboard, "--job-id", "plan"]
    done = client(cluster, *words, "--", "run", "--dry-run", "--config", TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "work         30 steps" in done.stdout
    again = client(cluster, *words[:5], "--follow", "plan")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "work         30 steps" in again.stdout


@pytest.mark.ray
def test_actors_come_up_on_nodes_of_their_role_and_idle_nodes_go(cluster: FakeCluster) -> None:
    done = client(cluster, "-c", CLIENT, cluster.dashboard, "tests/cluster", "python placement_job.py")
    (line,) = [part for part in done.stdout.splitlines() if part.startswith("PLACED ")]
    placed = json.loads(line.removeprefix("PLACED "))
    assert {who.rstrip("01"): roles for who, roles in placed["found"].items()} == {
        "learner": ["learner"],
        "rollout": ["rollout"],
        "sandbox": ["sandbox"],
    }
    assert placed["peak"] == 5  # head, learner, two rollout nodes of one CPU, sandbox
    assert placed["left"] == 1
    assert "END SUCCEEDED 0" in done.stdout


@pytest.mark.ray
def test_a_stopped_job_may_finish_and_is_no_success(cluster: FakeCluster, tmp_path: Path) -> None:
    kept = tmp_path / "checkpoint.txt"
    done = client(cluster, "-c", CLIENT, cluster.dashboard, "tests/cluster", f"python stoppable_job.py {kept}")
    assert "END STOPPED 130" in done.stdout, done.stdout + done.stderr
    assert kept.read_text() == "checkpoint"


@pytest.mark.ray
def test_another_token_is_refused(cluster: FakeCluster) -> None:
    words = ["-m", "autotraj", "submit", "--address", cluster.dashboard, "--follow", "plan"]
    env = cluster.client_environment | {"RAY_AUTH_TOKEN": "0" * 32}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "refuses this client's token" in done.stderr
