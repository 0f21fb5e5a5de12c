"""A sandbox gateway's occupancy among Ray's metrics, as `ray_autotraj_sandbox_…`.

The gateway is a process without Ray, with metrics of its own. The process that started it, or that was told about it,
reads its `stats`: this is the driver, or the actor of a sandbox node. So Ray's metrics include the sandbox. The last
answer is also part of the run's status (`status/sandbox.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.metrics import Gauge

from autotraj.status import sandbox
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import TlsFiles
from tool_sandbox.errors import GatewayError
from tool_sandbox.stats import Stats

logger = logging.getLogger(__name__)

ASK_EVERY_S = 2.0
ANSWER_TIMEOUT_S = 5.0
MAX_STEP_S = ASK_EVERY_S + ANSWER_TIMEOUT_S
"""Most seconds that one unanswered question adds to the silence, as the asking process may have been stopped, too."""

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
    """(gauge, tags without the gateway's, value)."""
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
    """How long a gateway has been silent, seconds, after a question that was asked `since_s` after the last one."""
    return 0.0 if answered else silent_s + min(since_s, MAX_STEP_S)


class GatewayWatch:
    """Asks the gateway from a thread until it is closed. If it doesn't answer, `sandbox_up` is 0 and other gauges stay."""

    def __init__(self, address: str, token: str, tls: TlsFiles | None = None) -> None:
        self._client = SandboxClient(address, token=token, tls=tls)
        self._address, self._tags = address, {"gateway": address}
        self._gauges = {name: Gauge(f"autotraj_{name}", text, tags) for name, (text, tags) in GAUGES.items()}
        self.silent_s = 0.0
        """Seconds since its last answer, or since the watch began, without times in which this process was stopped."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(ANSWER_TIMEOUT_S + ASK_EVERY_S)
        self._client.close()
        sandbox.forget(self._address)

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
            sandbox.tell(self._address, stats)
            self._closed.wait(ASK_EVERY_S)


@contextmanager
def watched(address: str, token: str | None, tls: TlsFiles | None = None) -> Iterator[None]:
    """Include the gateway at `address` in this process's metrics during the block. Ray must be running."""
    watch = GatewayWatch(address, token or "", tls)
    try:
        yield
    finally:
        watch.close()
