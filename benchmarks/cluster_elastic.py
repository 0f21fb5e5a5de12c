"""Engines that come and go with the load, on the cluster of cluster/fake.yaml: 1 learner node, 1 to 4 rollout nodes.

    python -m benchmarks.cluster_elastic

Ray's autoscaler, the job, vLLM, DeepSpeed and Docker are real. First the learner runs at full speed and waits for groups;
then it is stopped 98 % of the time, and engines wait for it. Prints the decisions and when engines were ready, and checks
the ledger of the last checkpoint: every prompt was trained on once, waits, or is in flight.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import psutil

from autotraj.run_folder.folder import latest_checkpoint
from examples.fake_cluster.cluster import ROOT, FakeCluster, fake_cluster

PATIENCE_S = 1200.0
SETTINGS = [
    "place_by_role=true",
    "grpo.num_steps=100000",
    "grpo.groups_per_step=8",
    "grpo.checkpoint_every=10",
    "eval.data.limit=16",
    'stages=["grpo"]',  # no reward model, so that four engines fit
    "elastic.max_actors=4",
    "elastic.window_steps=2",
    "elastic.grow_above=0.1",
    "elastic.shrink_above=0.3",
    "elastic.join_timeout_s=600",
]


class Brake:
    """Stops a process for 98 % of the time."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._over = process, threading.Event()
        self._thread = threading.Thread(target=self._hold, daemon=True)

    def __enter__(self) -> Brake:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _hold(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self._over.is_set():
                self._process.suspend()
                self._over.wait(2.45)
                self._process.resume()
                self._over.wait(0.05)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def engines(cluster: FakeCluster) -> int:
    return len({process.environ()["RAY_CLOUD_INSTANCE_ID"] for process in cluster.find("ray::RolloutActor")})


def check_ledger(run_dir: Path, groups_per_step: int, num_tasks: int) -> str:
    """The states of all prompts of all epochs in the newest checkpoint."""
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    (file,) = checkpoint.rglob("autotraj_state.msgpack")
    ledger = msgpack.unpackb(file.read_bytes(), strict_map_key=False)["ledger"]
    step = int(checkpoint.name.removeprefix("step-"))
    waiting = len(ledger["order"]) // 4 + len(ledger["returned"])
    in_flight, dropped = len(ledger["in_flight"]), sum(ledger["drop_reasons"].values())
    total = num_tasks * (ledger["epoch"] + 1)
    assert ledger["trained"] == step * groups_per_step, (ledger["trained"], step)
    assert ledger["trained"] + waiting + in_flight + dropped == total, (
        ledger["trained"],
        waiting,
        in_flight,
        dropped,
        total,
    )
    again = ledger["hand_back_reasons"]
    return (
        f"ledger at step {step}: {total} prompts = {ledger['trained']} trained once + {waiting} waiting + {in_flight} in "
        f"flight + {dropped} dropped ({ledger['drop_reasons']}); leased again: {again or 'none'}"
    )


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `with`: the cluster ends, too
    with tempfile.TemporaryDirectory() as name, fake_cluster(idle_timeout_minutes=0.3) as cluster:
        folder = Path(name)
        run_dir, log = folder / "run", folder / "submit.log"
        words = ["grpo", "--config", "examples/tiny/grpo.toml", f"run_dir={run_dir}", *SETTINGS]
        submit = [sys.executable, "-m", "autotraj", "submit", "--address", cluster.dashboard]
        with log.open("wb") as out:
            job = subprocess.Popen(
                [*submit, "--job-id", "elastic", "--", *words],
                cwd=ROOT,
                env=cluster.client_environment,
                stdout=out,
                stderr=out,
            )
        begun, seen = time.monotonic(), -1
        timeline: list[str] = []

        def wait(what: str, found: Callable[[], bool]) -> None:
            nonlocal seen
            deadline = time.monotonic() + PATIENCE_S
            while not found():
                if job.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"no {what}; {timeline}: {log.read_text()[-3000:]}")
                if (now := engines(cluster)) != seen:
                    seen = now
                    timeline.append(
                        f"{time.monotonic() - begun:4.0f} s: engines on {now} nodes, {len(cluster.nodes('rollout'))} up"
                    )
                    print(timeline[-1], flush=True)
                time.sleep(1.0)

        wait("first step", lambda: bool(lines(run_dir / "metrics.jsonl")))
        (learner,) = cluster.find("ray::Learner")

        def serving() -> int:
            return int(lines(run_dir / "metrics.jsonl")[-1]["runners_serving"])

        wait("four engines at work", lambda: serving() == 4)
        print(f"{time.monotonic() - begun:4.0f} s: four engines serve; the learner is held from here on", flush=True)
        with Brake(learner):
            wait("one engine", lambda: serving() == 1 and len(cluster.nodes("rollout")) == 1)
        print(f"{time.monotonic() - begun:4.0f} s: one engine, one rollout node", flush=True)
        unchanged = cluster.find("ray::Learner") == [learner]
        subprocess.run(
            [*submit, "--stop", "elastic"], cwd=ROOT, env=cluster.client_environment, timeout=700, check=True
        )
        print("\n| step | actors | wanted | why |\n|---|---|---|---|")
        for d in lines(run_dir / "elastic.jsonl"):
            print(f"| {d['step']} | {d['before']} | {d['target']} | {d['reason']} |")
        print(f"\nexit code {job.wait(60)}; the learner was {'never' if unchanged else ''} restarted")
        print(check_ledger(run_dir, groups_per_step=8, num_tasks=20000))


if __name__ == "__main__":
    main()
