"""Measures the time from `submit` to the first progress line on a warm cluster of cluster/fake.yaml, without the engine's
start.

    python -m benchmarks.cluster_submit

The job, Ray's autoscaler, vLLM, DeepSpeed and Docker are real. A first run brings the nodes up. Four times are measured: the
call of `submit`, the job's first output, the start of the engine (as in the run's status), and the line of step 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from examples.fake_cluster.cluster import ROOT, FakeCluster, fake_cluster

PATIENCE_S = 900.0
SETTINGS = ["place_by_role=true", "grpo.num_steps=1", "grpo.groups_per_step=8", "eval.data.limit=16"]


def run(cluster: FakeCluster, folder: Path) -> None:
    """Submits a run, watches it, and prints the times."""
    status, log = folder / "run/status.json", folder / "submit.log"
    words = ["grpo", "--config", "examples/tiny/grpo.toml", f"run_dir={folder}/run", *SETTINGS]
    command = [sys.executable, "-m", "autotraj", "submit", "--address", cluster.dashboard, "--", *words]
    begun = time.monotonic()
    with log.open("wb") as out:
        job = subprocess.Popen(command, cwd=ROOT, env=cluster.client_environment, stdout=out, stderr=out)

    def wait(what: str, found: Callable[[], bool]) -> float:
        while not found():
            if (job.poll() or 0) != 0 or time.monotonic() - begun > PATIENCE_S:
                sys.exit(f"no {what}: {log.read_text()[-3000:]}")
            time.sleep(0.1)
        return time.monotonic() - begun

    def engine_starts() -> bool:
        rows = json.loads(status.read_text())["rows"] if status.is_file() else []
        return any(row["who"].startswith("rollout actor") and row["does"] == "starts" for row in rows)

    spoke = wait("word of the job", lambda: "run folder" in log.read_text())
    starts = wait("engine that starts", engine_starts)
    started = wait("engine that is up", lambda: not engine_starts())
    first = wait("line of step 1", lambda: any(line.split()[:1] == ["1"] for line in log.read_text().splitlines()))
    job.wait(PATIENCE_S)
    print(
        f"the job's first word after {spoke:.1f} s; engine starting for {started - starts:.1f} s; first progress line after "
        f"{first:.1f} s: {first - (started - starts):.1f} s beyond the engine's start (wanted: 20)",
        flush=True,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, fake_cluster(idle_timeout_minutes=10) as cluster:
        for name in ("cold", "warm", "warm again"):
            print(f"{name}: ", end="", flush=True)
            (Path(folder) / name).mkdir()
            run(cluster, Path(folder) / name)


if __name__ == "__main__":
    main()
