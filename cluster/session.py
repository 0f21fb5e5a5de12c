"""Joins an existing Ray cluster, or starts one on this machine for the duration of a run."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray._private import auto_init_hook
from ray.autoscaler.v2.utils import is_autoscaler_v2

from cluster.main_thread import signals_kept
from cluster.roles import Ask, NodeType, read_node_types, too_large, unmet
from cluster.session_watch import RayDied, SessionWatch

logger = logging.getLogger(__name__)

CLUSTER_FILE_VARIABLE = "AUTOTRAJ_CLUSTER_FILE"
"""This variable is set on the head. It names the cluster's file, which lists its node types."""


@contextmanager
def ray_session(*, num_cpus: float, num_gpus: float, asks: Sequence[Ask] = ()) -> Iterator[None]:
    """A context in which `ray` is initialised and offers at least the given resources.

    If RAY_ADDRESS is set, as it is for a submitted job, that cluster is joined. Otherwise a local one is started, and ended
    at the end of the context. It declares as many logical CPUs as the plan needs, so actors share cores on a small machine.
    A Ray that is already initialised in this process is used as it is and left running.

    Raises RayDied when Ray's daemons on this machine end. Raises ValueError if the cluster doesn't have the resources and no
    autoscaler could add them. What an autoscaler could add is read from the cluster's file, whose path is in
    AUTOTRAJ_CLUSTER_FILE on the head, and compared with `asks`. If that file isn't known, the autoscaler is assumed to find
    nodes; the actors' own deadlines bound the wait.
    """
    if ray.is_initialized():
        _require(num_cpus, num_gpus, asks)
        yield
        return
    # By default, Ray would send usage statistics over the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without this, every actor prints a deprecation warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # RLlib passes its actors their configuration by reference. Ray's core reports that in this process as an error at every
    # start (ray#53727), although RLlib keeps the reference alive. Real errors come as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # A thread that asks Ray for something after the end would start another Ray.
    auto_init_hook.enable_auto_connect = False
    watch = None
    try:
        if os.environ.get("RAY_ADDRESS"):
            with signals_kept():
                ray.init(logging_level=logging.ERROR)
            _require(num_cpus, num_gpus, asks)
        else:
            cores = os.cpu_count() or 1
            if num_cpus > cores:
                logger.warning(
                    "the plan asks for %g CPUs, this machine has %d: actors will share cores", num_cpus, cores
                )
            with signals_kept():
                ray.init(
                    address="local",  # otherwise Ray would join a cluster that another user started here, and not resize it
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


def _require(num_cpus: float, num_gpus: float, asks: Sequence[Ask]) -> None:
    if cluster_file := os.environ.get(CLUSTER_FILE_VARIABLE):
        if problems := unmet(asks, read_node_types(cluster_file)):
            raise ValueError(
                "the cluster can never offer what this run asks for: "
                + "\n".join(problems)
                + "\nlower these settings, or raise max_workers or the node types' size in the cluster's file"
            )
        return
    if is_autoscaler_v2():  # as on Kubernetes, where the node types are in a resource that a job can't read
        return
    roles = {name for ask in asks for name in ask.resources if name not in ("CPU", "GPU")}
    have = ray.cluster_resources()
    if missing := sorted(roles - have.keys()):
        raise ValueError(
            f"place_by_role asks for nodes with the Ray resources {', '.join(missing)}, which no node of this cluster "
            f"offers: start nodes with ray start --resources='{{\"{missing[0]}\": 1}}', or set place_by_role=false"
        )
    # Before the sums: with fewer actors, one that is larger than every node would still wait forever.
    if problems := too_large(asks, _nodes({"CPU", "GPU"} | roles)):
        raise ValueError("\n".join(problems))
    for name, need in (("CPU", num_cpus), ("GPU", num_gpus)):
        if have.get(name, 0.0) < need:
            raise ValueError(
                f"the plan needs {need:g} {name}s, the Ray cluster has {have.get(name, 0.0):g}: lower rollout.num_actors "
                f"or learner.num_learners, or add nodes"
            )


def _nodes(names: set[str]) -> list[NodeType]:
    """The nodes of the cluster as types, with what they offer of the named resources."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    same = Counter(tuple((name, node[name]) for name in sorted(names) if name in node) for node in alive)
    return [NodeType("node", count, dict(offered)) for offered, count in same.items()]
