"""Measures the cost of losing each part of a cluster, by kills during a run on the cluster of cluster/fake.yaml.

    python -m benchmarks.cluster_kills [--steps-between 4]

Ray's autoscaler, the job, vLLM, DeepSpeed and Docker are real. A node is killed by SIGKILL to all its processes at once.
Prints a Markdown table: seconds from the kill to the next optimizer step; the longest wait for a step after it, as one or
two may still use groups that were sampled before; the time until nine of ten tool calls in a step are right; prompts that
were leased again; steps that were taken again; and lost prompts, which must be none.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from examples.fake_cluster.cluster import ROOT, FakeCluster, fake_cluster

PATIENCE_S = 900.0
SETTINGS = [
    "place_by_role=true",
    "grpo.num_steps=100000",
    "grpo.groups_per_step=8",
    "grpo.checkpoint_every=2",
    "eval.data.limit=16",
]


def node_of(cluster: FakeCluster, name: str) -> str:
    """The node on which an actor's process runs."""
    return cluster.find(name)[0].environ()["RAY_CLOUD_INSTANCE_ID"]


VICTIMS: dict[str, Callable[[FakeCluster], None]] = {
    "rollout actor (process)": lambda cluster: cluster.find("ray::RolloutActor")[0].kill(),
    "rollout node": lambda cluster: cluster.kill_node(node_of(cluster, "ray::RolloutActor")),
    "gateway (process)": lambda cluster: cluster.find("tool_sandbox.server")[0].kill(),
    "sandbox node": lambda cluster: cluster.kill_node(node_of(cluster, "ray::GatewayActor")),
    "learner (process)": lambda cluster: cluster.find("ray::Learner")[0].kill(),
    "learner node": lambda cluster: cluster.kill_node(node_of(cluster, "ray::Learner")),
}


class Run:
    """A GRPO job and its metrics."""

    def __init__(self, cluster: FakeCluster, folder: Path) -> None:
        self._metrics = folder / "run/metrics.jsonl"
        self._log = folder / "submit.log"
        words = ["grpo", "--config", "examples/tiny/grpo.toml", f"run_dir={folder}/run", *SETTINGS]
        command = [sys.executable, "-m", "autotraj", "submit", "--address", cluster.dashboard, "--", *words]
        with self._log.open("wb") as log:
            self._job = subprocess.Popen(command, cwd=ROOT, env=cluster.client_environment, stdout=log, stderr=log)

    def steps(self) -> list[dict[str, Any]]:
        if not self._metrics.is_file():
            return []
        return [json.loads(line) for line in self._metrics.read_text().splitlines() if line.endswith("}")]

    def wait(self, what: str, found: Callable[[list[dict[str, Any]]], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := found(self.steps())):
            if self._job.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"no {what}: {self._log.read_text()[-3000:]}")
            time.sleep(0.2)
        return value


def total(step: dict[str, Any], prefix: str) -> int:
    return int(sum(value for name, value in step.items() if name.startswith(prefix)))


def measure(run: Run, kill: Callable[[], None], num_steps: int) -> str:
    """Kills after `num_steps` steps, and watches until as many more are taken and tools work."""
    begun = time.time()
    before = run.wait("steps before the kill", lambda s: [m for m in s if m["time"] > begun][num_steps - 1 :])[-1]
    killed = time.time()
    kill()

    def recovered(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        after = [m for m in steps if m["time"] > killed]
        return after if len(after) >= num_steps and after[-1].get("tool/ok", 0.0) >= 0.9 else []

    after = run.wait("recovery", recovered)
    times = [killed, *(m["time"] for m in after)]
    waits = [later - earlier for earlier, later in pairwise(times)]
    works = next(m["time"] for i, m in enumerate(after) if all(n.get("tool/ok", 0.0) >= 0.9 for n in after[i:]))
    cells = [f"{waits[0]:.0f}", f"{max(waits):.0f}", f"{works - killed:.0f}"]
    cells += [str(max(0, total(after[-1], "handed_back/") - total(before, "handed_back/")))]
    cells += [str(max(0, int(before["step"]) + 1 - int(after[0]["step"])))]
    cells += [str(total(after[-1], "dropped/") - total(before, "dropped/"))]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps-between", type=int, default=4)
    parser.add_argument("--only", default=r".", help="victims whose name this regular expression finds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fake_cluster() as cluster:
        run = Run(cluster, Path(folder))
        run.wait("first step", len)
        print(
            "| killed | next step, s | longest wait, s | tools right, s | prompts leased again | steps again | lost |"
        )
        print("|---|---|---|---|---|---|---|", flush=True)
        for name, kill in VICTIMS.items():
            if re.search(args.only, name):
                print(f"| {name} | {measure(run, lambda kill=kill: kill(cluster), args.steps_between)} |", flush=True)


if __name__ == "__main__":
    main()
