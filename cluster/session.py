"""Joining the Ray cluster that is there, or starting one on this machine for the length of a run."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray._private import auto_init_hook
from ray.autoscaler.v2.utils import is_autoscaler_v2

from cluster.roles import Ask, read_node_types, unmet
from cluster.session_watch import RayDied, SessionWatch

logger = logging.getLogger(__name__)

CLUSTER_FILE_VARIABLE = "AUTOTRAJ_CLUSTER_FILE"
"""Set on the head: the cluster's file, with its node types."""


@contextmanager
def ray_session(*, num_cpus: float, num_gpus: float, asks: Sequence[Ask] = ()) -> Iterator[None]:
    """Within it `ray` is initialised and offers at least the given resources.

    With RAY_ADDRESS set (a submitted job has it) that cluster is joined; otherwise a local one is started, and ended on
    leaving. A local one declares as many logical CPUs as the plan needs: on a small machine the actors then share cores.
    A Ray that is already initialised in this process is used as it is and left running.

    Raises RayDied when Ray's daemons on this machine end, and ValueError if the cluster hasn't got the resources and no
    autoscaler could add them. What an autoscaler could add is known from the cluster's file, whose path the head's
    environment has in AUTOTRAJ_CLUSTER_FILE; it is held against `asks`. An autoscaler whose file isn't known is trusted to
    find nodes; the actors' own deadlines bound the wait.
    """
    if ray.is_initialized():
        _require(num_cpus, num_gpus, asks)
        yield
        return
    # Ray's own default would export the usage statistics over the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without it every actor prints a deprecation banner.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # RLlib hands its actors their configuration by reference, which Ray's core in this process reports as an error at every
    # start (ray#53727); RLlib keeps the reference alive. Real errors come as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # A thread that asks Ray for something after the end would start another Ray.
    auto_init_hook.enable_auto_connect = False
    watch = None
    try:
        if os.environ.get("RAY_ADDRESS"):
            with _signals_kept():
                ray.init(logging_level=logging.ERROR)
            _require(num_cpus, num_gpus, asks)
        else:
            cores = os.cpu_count() or 1
            if num_cpus > cores:
                logger.warning(
                    "the plan asks for %g CPUs, this machine has %d: actors will share cores", num_cpus, cores
                )
            with _signals_kept():
                ray.init(
                    address="local",  # else Ray would join, and refuse to size, a cluster that somebody started here
                    num_cpus=max(cores, int(-(-num_cpus // 1))),
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            _require(0, num_gpus, asks)
        with SessionWatch() as watch:
            yield
    except Exception as error:
        if watch is not None and watch.died and not isinstance(error, RayDied):
            raise RayDied(watch.died) from error
        raise
    finally:
        ray.shutdown(wait_for_processes=True)
        if watch is not None:
            watch.end_helpers()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """A signal in the block takes effect at its end: a Ray that is half up can't be taken down, and what is raised in the
    middle of it may be lost.

    Ray's core puts a handler of its own for SIGTERM over ours, with which a stopped job would die on the spot instead of
    writing its checkpoint (2.60)."""
    if threading.current_thread() is not threading.main_thread():
        yield  # nobody's handlers can be set from here
        return
    seen: list[int] = []
    kept = {
        number: signal.signal(number, lambda number, _: seen.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    if seen:
        signal.raise_signal(seen[0])


def _require(num_cpus: float, num_gpus: float, asks: Sequence[Ask]) -> None:
    if cluster_file := os.environ.get(CLUSTER_FILE_VARIABLE):
        if problems := unmet(asks, read_node_types(cluster_file)):
            raise ValueError(
                "the cluster can never offer what this run asks for: "
                + "\n".join(problems)
                + "\nlower these settings, or raise max_workers or the node types' size in the cluster's file"
            )
        return
    if is_autoscaler_v2():  # as on Kubernetes, where the nodes' types are in a resource that a job can't read
        return
    have = ray.cluster_resources()
    for name, need in (("CPU", num_cpus), ("GPU", num_gpus)):
        if have.get(name, 0.0) < need:
            raise ValueError(
                f"the plan needs {need:g} {name}s, the Ray cluster has {have.get(name, 0.0):g}: lower rollout.num_actors "
                f"or learner.num_learners, or add nodes"
            )
    roles = {name for ask in asks for name in ask.resources if name not in ("CPU", "GPU")}
    if missing := sorted(roles - have.keys()):
        raise ValueError(
            f"place_by_role asks for nodes with the Ray resources {', '.join(missing)}, which no node of this cluster "
            f"offers: start nodes with ray start --resources='{{\"{missing[0]}\": 1}}', or set place_by_role=false"
        )
