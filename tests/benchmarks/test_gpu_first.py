"""The script for a new GPU, without one: every kind of part gives its rows, with real models of 1M parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_first import run_part

pytestmark = pytest.mark.slow


def test_all_kinds_of_parts_give_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    parts = ["machine", "attention", "rounding", "learner-7b-zero3"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_first", "--only", *parts, "--rows", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert list(dict.fromkeys(row["part"] for row in rows)) == parts
    (exact,) = [row for row in rows if "0.02: float32, varlen, beside others" in row["what"]]
    assert float(exact["value"].split()[2].strip(",")) < 1e-4, "the same function, computed in another way"
    (peak,) = [row for row in rows if "peak memory" in row["what"]]
    assert float(peak["value"].split()[0]) > 0
    assert "planned" in peak["beside"]


def test_a_part_that_takes_too_long_is_a_row() -> None:
    (row,) = run_part("machine", 0.01)
    assert (row.what, row.value) == ("failed", "it wasn't done within 0 s")
