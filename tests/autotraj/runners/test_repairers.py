"""Repair actors of their own, as a stage gets them. What they do with requests is tested in tests/actors."""

from contextlib import AbstractContextManager

import pytest
import ray
from tiny_run import ROOT

from actors.config import ToolAccess
from autotraj.config.run import load
from autotraj.runners.pool import RunnerPool
from autotraj.runners.repairers import repairer_pool

pytestmark = pytest.mark.ray


def two_repairers() -> AbstractContextManager[RunnerPool]:
    nobody = "http://127.0.0.1:1/v1"  # isn't asked before there is something to repair
    config = load(
        ROOT / "examples/tiny/run.toml",
        [
            f'model="{ROOT / "examples/tiny/base"}"',
            'repair.repairer="endpoint"',
            f'repair.endpoint={{base_url="{nobody}",model="m"}}',
            "repair.num_actors=2",
        ],
    )
    policy: RunnerPool = None  # type: ignore[assignment]  # stands for the rollout actors, which don't repair here
    return repairer_pool(config, ToolAccess(sandbox_address="127.0.0.1:1"), policy)


def test_actors_of_their_own_come_up_and_are_ended() -> None:
    """Also where Ray has ended first, as after the death of a raylet: there is nothing to end then, and no error."""
    ray.init(
        address="local", num_cpus=3, include_dashboard=False, object_store_memory=100 * 1024**2, log_to_driver=False
    )
    try:
        with two_repairers() as pool:
            pool.wait_ready()
            assert pool.num_ready == 2
        with two_repairers():
            ray.shutdown()
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
