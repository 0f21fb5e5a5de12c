"""The pool that repairs: the policy's own engines, or repair actors that use an engine or an endpoint."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from actors.config import RepairSettings, ToolAccess
from actors.repair.actor import RepairActor
from autotraj.config.run import RunConfig
from autotraj.runners.calls import end_actor
from autotraj.runners.pool import RunnerPool
from cluster.roles import ROLLOUT, role


@contextmanager
def repairer_pool(config: RunConfig, access: ToolAccess, runners: RunnerPool) -> Iterator[RunnerPool]:
    """The pool to submit `repair` to: `runners` itself if the policy repairs, else actors for the length of the block.

    These begin to start; `wait_ready` or `poll` sees them come up."""
    if config.repair.repairer == "policy":
        yield runners
        return
    settings = RepairSettings(
        model=config.model,
        repair=config.repair,
        episode=config.episode,
        quality=config.quality,
        reward=config.reward,
        **{name: getattr(access, name) for name in ToolAccess.model_fields},
    )
    actor = ray.remote(RepairActor)
    run = uuid.uuid4().hex[:6]  # a name is unique in the namespace
    actors = [
        actor.options(
            name=f"repair-{index}-{run}",
            num_cpus=config.repair.num_cpus,
            num_gpus=config.repair.num_gpus,
            resources=role(ROLLOUT, by_role=config.place_by_role),
            max_restarts=-1,  # `RunnerPool` counts deaths and gives up
            max_concurrency=1000,
        ).remote(settings, index)
        for index in range(config.repair.num_actors)
    ]
    manager = FaultTolerantActorManager(actors, max_remote_requests_in_flight_per_actor=1000)
    pool = RunnerPool(
        manager,
        start_timeout_s=config.grpo.start_timeout_s,
        sync_timeout_s=config.grpo.sync_timeout_s,
        role="repair actor",
    )
    try:
        pool.start()
        yield pool
    finally:
        for one in actors:
            end_actor(one)
