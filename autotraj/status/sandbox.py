"""What a run's sandbox gateways do, as rows of its status.

The process that watches a gateway, on any node, writes to the cluster's key-value store. The controller reads it there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

from autotraj.status.rows import StatusRow
from tool_sandbox.stats import Stats

logger = logging.getLogger(__name__)

FORGOTTEN_AFTER_S = 30.0
"""If the watcher of a gateway has written nothing for this long, it has died with its node."""
NAMESPACE = b"autotraj"


def row(address: str, stats: Stats | None) -> StatusRow:
    """What a gateway does, for the status. `stats` is None if it doesn't answer."""
    if stats is None:
        return StatusRow(who=f"sandbox {address}", does="silent")
    pool = stats.pool
    detail = f"{pool.slots_taken} of {pool.slots_taken + pool.slots_free} places taken"
    if pool.queue:
        detail += f", {pool.queue} calls wait for one"
    return StatusRow(who=f"sandbox {address}", does="runs calls" if pool.slots_taken else "idle", detail=detail)


def sandbox_rows() -> list[StatusRow]:
    """The rows of this job's gateways, as last written."""
    found = []
    for key in sorted(internal_kv._internal_kv_list(_key(""), namespace=NAMESPACE)):
        if text := internal_kv._internal_kv_get(key, namespace=NAMESPACE):
            told = json.loads(text)
            if time.time() - told["time"] < FORGOTTEN_AFTER_S:
                found.append(StatusRow(**told["row"]))
    return found


def tell(address: str, stats: Stats | None) -> None:
    """Writes the last answer of the gateway at `address`. `stats` is None if it doesn't answer."""
    told = {"time": time.time(), "row": dataclasses.asdict(row(address, stats))}
    try:
        internal_kv._internal_kv_put(_key(address), json.dumps(told).encode(), namespace=NAMESPACE)
    except (RuntimeError, RayError) as error:  # the cluster ends, or its head restarts
        logger.debug("the status of the sandbox isn't told: %s", error)


def forget(address: str) -> None:
    """Removes the gateway at `address`, which is no longer watched."""
    if ray.is_initialized():
        internal_kv._internal_kv_del(_key(address), namespace=NAMESPACE)


def _key(address: str) -> bytes:
    return f"gateway/{ray.get_runtime_context().get_job_id()}/{address}".encode()
