"""One gateway and one Ray for the tests that run the whole loop."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotraj.config.run import RunConfig, load
from autotraj.gateways.session import GatewayAccess

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny/grpo.toml"


def tiny(tmp_path: Path, *overrides: str) -> RunConfig:
    """The tiny default, small enough for a test."""
    return load(
        TINY,
        [
            f'model="{ROOT / "examples/tiny/base"}"',
            f'run_dir="{tmp_path / "run"}"',
            "eval.data.limit=16",
            "data.limit=200",
            "grpo.groups_per_step=4",
            "rollout.group_size=4",
            "grpo.num_steps=3",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayAccess]:
    from autotraj.launch import run_session

    # Instead of every ten seconds: a run of a few steps would be over with its first report.
    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")
    with run_session(tiny(tmp_path_factory.mktemp("session"), "learner.num_learners=2")) as running:
        yield running
