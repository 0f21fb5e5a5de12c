"""The way a cluster is used, with its real parts: a head of `fake.yaml`, a job, a lost node, a stop, a resume, a report."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.fake_cluster.cluster import ROOT, FakeCluster, fake_cluster

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.docker, pytest.mark.timeout(1500)]

STEPS = 60
SMALL = [
    "place_by_role=true",
    "data.limit=200",
    "eval.data.limit=16",
    "synthesis.num_questions=16",
    "synthesis.num_candidates=4",
    "sft.epochs=1",
    "reward_model.epochs=1",
    "reward_model.held_out=0.4",
    "reward_model.evaluate_every=1",
    f"grpo.num_steps={STEPS}",
    "grpo.groups_per_step=4",
    "grpo.checkpoint_every=5",
    "rollout.group_size=4",
    "online_repair.enabled=false",
]
PATIENCE_S = 600.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with fake_cluster() as running:
        yield running


def submit(cluster: FakeCluster, *words: str, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "autotraj", "submit", "--address", cluster.dashboard, *words]
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=cluster.client_environment, stdout=out, stderr=out)


def ended(process: "subprocess.Popen[bytes]", log: Path) -> int:
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"submit didn't end: {tail(log)}") from None


def tail(log: Path) -> str:
    return log.read_text()[-3000:]


def steps(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "grpo/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for(what: str, found: Callable[[], Any], process: "subprocess.Popen[bytes]", log: Path) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert process.poll() is None, f"submit ended with {process.returncode} before {what}: {tail(log)}"
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S:.0f} s: {tail(log)}"
        time.sleep(0.5)
    return value


def asked(cluster: FakeCluster, path: str) -> Any:
    """Of the dashboard, as its page asks."""
    request = urllib.request.Request(cluster.dashboard + path, headers={"Authorization": f"Bearer {cluster.token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_a_whole_run_survives_a_lost_node_a_stop_and_a_resume(cluster: FakeCluster, tmp_path: Path) -> None:
    log, run_dir = tmp_path / "submit.log", tmp_path / "run"
    words = ["run", "--config", "examples/tiny/run.toml", f"run_dir={run_dir}", *SMALL]
    job = submit(cluster, "--job-id", "first", "--", *words, log=log)
    wait_for("GRPO's first step", lambda: len(steps(run_dir)) >= 1, job, log)

    # Somebody watches it.
    (shown,) = [job for job in asked(cluster, "/api/jobs/") if job["submission_id"] == "first"]
    assert shown["status"] == "RUNNING"
    assert shown["metadata"]["run_dir"] == str(run_dir)
    actors = asked(cluster, "/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
    alive = Counter(a["class_name"] for a in actors if a["state"] == "ALIVE")
    assert {"RolloutActor", "Learner", "GatewayActor", "RewardModelActor"} <= alive.keys()
    environment = cluster.client_environment | {"RAY_ADDRESS": cluster.address}
    status = subprocess.run(
        [sys.executable, "-m", "autotraj", "status"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "rollout actor 1" in status.stdout, status.stdout + status.stderr

    # A machine is taken away.
    (lost,) = {node for node in cluster.nodes("rollout") if node in engine_nodes(cluster)}
    cluster.kill_node(lost)
    killed_at = len(steps(run_dir))
    wait_for("a step after the node's loss", lambda: len(steps(run_dir)) > killed_at + 2, job, log)
    assert lost not in cluster.nodes("rollout")

    # Somebody stops it, and goes on with it.
    stopped = submit(cluster, "--stop", "first", log=tmp_path / "stop.log")
    assert ended(stopped, tmp_path / "stop.log") == 0
    assert ended(job, log) == 130
    assert "interrupted; the same command goes on" in log.read_text(), tail(log)
    done = len(steps(run_dir))
    assert done < STEPS, "stopped too late to show anything"
    resumed = submit(cluster, "--job-id", "second", "--resume", "first", log=log)
    assert ended(resumed, log) == 0, tail(log)
    assert f"grpo: resumed at step {done}" in log.read_text()

    metrics = steps(run_dir)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))  # each step, and so each of its prompts, once
    assert metrics[done - 1]["runner_restarts"] >= 1
    # No prompt was lost; four groups that are all right leave a step nothing to learn from, and are counted.
    assert {name for name in metrics[-1] if name.startswith("dropped/")} <= {"dropped/no_variance"}
    assert all(m["sync/logprob_diff_max"] <= 1e-4 for m in metrics)
    # What `make demo` ends with.
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["base", "sft", "grpo"]
    page = (run_dir / "report.html").read_text()
    sections = {"results", "reward", "synthesis", "training", "trajectories"}
    assert set(re.findall(r"<section id=\"([^\"]+)\"", page)) == sections


def engine_nodes(cluster: FakeCluster) -> set[str]:
    return {process.environ()["RAY_CLOUD_INSTANCE_ID"] for process in cluster.find("ray::RolloutActor")}


def test_another_token_is_refused(cluster: FakeCluster) -> None:
    environment = cluster.client_environment | {"RAY_AUTH_TOKEN": "0" * 32}
    command = [sys.executable, "-m", "autotraj", "submit", "--address", cluster.dashboard, "--follow", "first"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "refuses this client's token" in done.stderr


def test_what_the_cluster_can_never_offer_is_said_by_the_job_at_once(cluster: FakeCluster, tmp_path: Path) -> None:
    words = ["grpo", "--config", "examples/tiny/grpo.toml", f"run_dir={tmp_path}/run", "rollout.num_actors=9"]
    log = tmp_path / "submit.log"
    assert ended(submit(cluster, "--", *words, "place_by_role=true", log=log), log) == 2
    assert "can never offer" in log.read_text()


def test_nothing_is_left(cluster: FakeCluster) -> None:
    """Of a cluster that has ended; the last test, as it ends a cluster of its own."""
    with fake_cluster() as other:
        assert other.find("raylet")
        pid = os.getpid()
    assert not [process for process in other.find("") if process.pid != pid]
    assert not other.folder.exists()
    assert cluster.find("raylet")  # this one isn't touched
