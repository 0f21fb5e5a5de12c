"""One gateway and one Ray for the tests that run the whole loop."""

import os
from collections.abc import Iterator

import pytest
from tiny_run import tiny

from autotraj.gateways.session import GatewayAccess


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayAccess]:
    from autotraj.launch import run_session

    # Instead of every ten seconds: a run of a few steps would be over with its first report.
    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")
    with run_session(tiny(tmp_path_factory.mktemp("session"), "learner.num_learners=2")) as running:
        yield running
