"""The loop's script for a GPU, without one: real engine, learner and sandbox, with a model of 5M parameters."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.docker
@pytest.mark.engine
@pytest.mark.ray
def test_the_loop_runs_and_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [sys.executable, "-m", "benchmarks.gpu_loop", "--steps", "2", "--out", str(out)]
    done = subprocess.run([*command, "--set", "rollout.group_size=4"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = dict(line.strip("| ").split(" | ", 1) for line in out.read_text().splitlines()[2:])
    assert float(rows["generated tokens/s of the whole loop"].replace(",", "")) > 0
    assert float(rows["a weight sync"].split()[0]) > 0
    assert rows["engines started again"] == "0"
