"""Publishes a run's status in two places: `status.json` in its folder, and the key-value store of its Ray cluster.

The controller writes it while it polls, at most once a second. The status holds the time at which it was written.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled; its stub leaves it out
from ray.exceptions import RayError
from ray.experimental import internal_kv

from autotraj.errors import UserError
from autotraj.status.rows import ENDED, STATUS_FILE, Since, StatusRow
from autotraj.status.sandbox import sandbox_rows
from storage.whole import write_whole

logger = logging.getLogger(__name__)

NAMESPACE = b"autotraj"
KEY_PREFIX = b"status/"
EVERY_S = 1.0
CONNECT_TIMEOUT_S = 5.0


class StatusBoard:
    """`rows` and `title` are called whenever the status is written."""

    def __init__(self, folder: Path, *, rows: Callable[[], Sequence[StatusRow]], title: Callable[[], str]) -> None:
        self._path = folder / STATUS_FILE
        self._rows, self._title = rows, title
        self._since = Since()
        self._doing = ("starts", time.monotonic())
        self._written = float("-inf")
        self._key = KEY_PREFIX + f"{socket.gethostname()}/{os.getpid()}".encode()  # a process does one thing at a time
        folder.mkdir(parents=True, exist_ok=True)

    def look(self) -> None:
        """Writes the status if the last one is at least a second old."""
        if time.monotonic() - self._written >= EVERY_S:
            self.write()

    def now_does(self, what: str) -> None:
        """Sets what the controller itself does from here on: it runs a loop, or waits for one thing."""
        if what != self._doing[0]:
            self._doing = (what, time.monotonic())
            self.write()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Sets `now_does` during the block."""
        before = self._doing[0]
        self.now_does(what)
        try:
            yield
        finally:
            self.now_does(before)

    def write(self) -> None:
        now = self._written = time.monotonic()
        rows = list(self._rows())
        if rows and ray.is_initialized():
            rows += sandbox_rows()
        status = {
            "time": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "run_dir": str(self._path.parent),
            "title": self._title(),
            "doing": self._doing[0],
            "doing_s": now - self._doing[1],
            "rows": [
                {"who": r.who, "does": r.does, "waits_on": r.waits_on, "detail": r.detail, "since_s": since_s}
                for r, since_s in zip(rows, self._since.seconds(rows, now), strict=True)
            ],
        }
        text = json.dumps(status)
        try:
            write_whole(self._path, text)
        except OSError as error:  # no reason to end the run: without a status nothing is lost
            logger.warning("%s can't be written: %s", self._path, error)
        if ray.is_initialized():
            internal_kv._internal_kv_put(self._key, text.encode(), namespace=NAMESPACE)

    def close(self) -> None:
        """To be called when the run, or a part of it, ends. The file then says so, and the status leaves the cluster."""
        self._rows = list
        self._doing = (ENDED, time.monotonic())
        self.write()
        if ray.is_initialized():
            internal_kv._internal_kv_del(self._key, namespace=NAMESPACE)


def of_cluster() -> list[dict[str, Any]]:
    """The statuses of all runs of the cluster at RAY_ADDRESS, or of the one on this machine. Raises UserError."""
    try:
        address = services.canonicalize_bootstrap_address_or_die(os.environ.get("RAY_ADDRESS", "auto"))
        _reach(address)
        # Not `ray.init`: it would add a job to the dashboard for a command that only reads.
        store = GcsClient(address=address)
        keys = store.internal_kv_keys(KEY_PREFIX, NAMESPACE, timeout=CONNECT_TIMEOUT_S)
        found = [store.internal_kv_get(key, NAMESPACE, timeout=CONNECT_TIMEOUT_S) for key in sorted(keys)]
    except UserError:
        raise
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise UserError(
            f"no Ray cluster: {str(error).splitlines()[0]}; set RAY_ADDRESS, or name the run: status RUN_DIR"
        ) from error
    if not (texts := [text for text in found if text]):  # a run may have ended since its key was listed
        raise UserError(
            "no run reports to this Ray cluster: there is none, or it hasn't started its engines yet; ask again"
        )
    return [json.loads(text) for text in texts]


def _reach(address: str) -> None:
    """Raises UserError if nothing listens at `host:port`. Ray itself would try for minutes (2.60)."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"RAY_ADDRESS: nothing answers at {address} within {CONNECT_TIMEOUT_S:g} s ({error}); is the cluster up, and "
            "is this the address of its head (port 6379 unless it was started with another)?"
        ) from error
