"""A sandbox gateway's occupancy among Ray's metrics, as `ray_autotraj_sandbox_…`.

The gateway is a process without Ray, with metrics of its own; whoever started it, or was told of it, asks for its `stats`:
the driver, or the actor of a sandbox node. So one scrape of Ray's agents shows the sandbox, too. The last answer also
stands in the cluster's key-value store, where the controller finds it for the run's status.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.util.metrics import Gauge

from autotraj.status.rows import Row
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import TlsFiles
from tool_sandbox.errors import GatewayError
from tool_sandbox.stats import Stats

logger = logging.getLogger(__name__)

ASK_EVERY_S = 2.0
ANSWER_TIMEOUT_S = 5.0
MAX_STEP_S = ASK_EVERY_S + ANSWER_TIMEOUT_S
"""Most that one question without an answer adds to the silence: who asks may have been stopped meanwhile, too."""
FORGOTTEN_AFTER_S = 30.0
"""Whoever asks a gateway died with its node, if it has told nothing for so long."""
NAMESPACE = b"autotraj"

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sandbox_up": ("1 if the gateway answers, else 0", ("gateway",)),
    "sandbox_slots": ("Places for a call, by state: free or taken", ("gateway", "state")),
    "sandbox_queue_length": ("Calls that wait for a slot", ("gateway",)),
    "sandbox_containers": ("Containers by state", ("gateway", "state")),
    "sandbox_containers_lost": (
        "Containers so far that died, or were replaced while they worked",
        ("gateway", "reason"),
    ),
}


def values(stats: Stats) -> list[tuple[str, dict[str, str], float]]:
    """(gauge, tags but for the gateway, value)."""
    pool = stats.pool
    containers = {"serving": 0, "starting": 0, "retiring": 0} | pool.containers
    return [
        ("sandbox_slots", {"state": "free"}, pool.slots_free),
        ("sandbox_slots", {"state": "taken"}, pool.slots_taken),
        ("sandbox_queue_length", {}, pool.queue),
        *(("sandbox_containers", {"state": state}, number) for state, number in containers.items()),
        ("sandbox_containers_lost", {"reason": "died"}, stats.containers_died),
        *(("sandbox_containers_lost", {"reason": why}, number) for why, number in stats.containers_recycled.items()),
    ]


def silence(silent_s: float, since_s: float, *, answered: bool) -> float:
    """How long a gateway has been silent, after a question that was asked `since_s` after the last."""
    return 0.0 if answered else silent_s + min(since_s, MAX_STEP_S)


def row(address: str, stats: Stats | None) -> Row:
    """What a gateway does, for the status; None: it doesn't answer."""
    if stats is None:
        return Row(who=f"sandbox {address}", does="silent")
    pool = stats.pool
    detail = f"{pool.slots_taken} of {pool.slots_taken + pool.slots_free} places taken"
    if pool.queue:
        detail += f", {pool.queue} calls wait for one"
    return Row(who=f"sandbox {address}", does="runs calls" if pool.slots_taken else "idle", detail=detail)


def sandbox_rows() -> list[Row]:
    """Of this job's gateways, as they last told."""
    found = []
    for key in sorted(internal_kv._internal_kv_list(_key(""), namespace=NAMESPACE)):
        if text := internal_kv._internal_kv_get(key, namespace=NAMESPACE):
            told = json.loads(text)
            if time.time() - told["time"] < FORGOTTEN_AFTER_S:
                found.append(Row(**told["row"]))
    return found


def _key(address: str) -> bytes:
    return f"gateway/{ray.get_runtime_context().get_job_id()}/{address}".encode()


class GatewayWatch:
    """Asks until it is closed, from a thread. A gateway that is silent has `sandbox_up` 0, and keeps its last numbers."""

    def __init__(self, address: str, token: str, tls: TlsFiles | None = None) -> None:
        self._client = SandboxClient(address, token=token, tls=tls)
        self._address, self._key, self._tags = address, _key(address), {"gateway": address}
        self._gauges = {name: Gauge(f"autotraj_{name}", text, tags) for name, (text, tags) in GAUGES.items()}
        self.silent_s = 0.0
        """Since its last answer, or since the watch began, as far as this process ran to hear one."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(ANSWER_TIMEOUT_S + ASK_EVERY_S)
        self._client.close()
        if ray.is_initialized():
            internal_kv._internal_kv_del(self._key, namespace=NAMESPACE)

    def _run(self) -> None:
        answered, last = True, time.monotonic()
        while not self._closed.is_set():
            stats = None
            try:
                stats = self._client.stats(ANSWER_TIMEOUT_S)
            except GatewayError as error:
                if answered and not self._closed.is_set():
                    logger.warning("no metrics of the sandbox: %s", error)
            answered, now = stats is not None, time.monotonic()
            self.silent_s, last = silence(self.silent_s, now - last, answered=answered), now
            for name, tags, value in values(stats) if stats else []:
                self._gauges[name].set(value, self._tags | tags)
            self._gauges["sandbox_up"].set(float(answered), self._tags)
            told = {"time": time.time(), "row": dataclasses.asdict(row(self._address, stats))}
            try:
                internal_kv._internal_kv_put(self._key, json.dumps(told).encode(), namespace=NAMESPACE)
            except (RuntimeError, RayError) as error:  # the cluster ends, or its head restarts
                logger.debug("the status of the sandbox isn't told: %s", error)
            self._closed.wait(ASK_EVERY_S)


@contextmanager
def watched(address: str, token: str | None, tls: TlsFiles | None = None) -> Iterator[None]:
    """The gateway at `address` among this process's metrics, for the length of the block; Ray must be up."""
    watch = GatewayWatch(address, token or "", tls)
    try:
        yield
    finally:
        watch.close()
