"""One machine at a time works on a run whose `run_dir` is a URI.

`lock` guards a folder of this machine. Machines share only the storage. So each driver writes a claim of its own beside the
run, `.claims/HOST-ID.json`, and then lists all claims. A driver that finds another valid claim removes its own and is
refused. If the storage lists all that was written before (S3 since 2020, Google's, Azure's, a file system), two drivers are
never accepted; two that start in the same second may both be refused. This needs no conditional write; pyarrow 26 has none.

A driver writes its claim again every `BEAT_S`. A claim's age is the storage's time of a claim just written minus that of the
claim itself, so no machine's clock matters. A claim that is `SILENCE_S` old is invalid: another driver removes it and writes
a higher term into its own claim. A driver that was only paused finds this before it next writes to the run's URI, and ends.
What it has begun to write at that moment isn't undone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from autotraj.errors import UserError
from autotraj.run_folder.lock import OWN, locked
from storage.objects import Entry, Storage, StorageError

logger = logging.getLogger(__name__)

CLAIMS = ".claims"
ID_FILE = f"{OWN}claim"
"""This file of the working folder has the names of this machine's claims, to recognize those of its ended processes."""
BEAT_S = 20.0
SILENCE_S = 300.0
_held: dict[str, Claim] = {}
"""This process's claims, by the run's URI."""


class Place(Protocol):
    """Where a run is kept, as `location.RunLocation` is."""

    path: Path
    run_dir: str
    storage: Storage | None


@contextmanager
def held(location: Place, *, beat_s: float = BEAT_S, silence_s: float = SILENCE_S) -> Iterator[None]:
    """Within the block only this process works on the run at `location`: on this machine or, at a URI, on all machines.

    Raises UserError, which names the other process, if another one works on it."""
    with locked(location.path):
        if location.storage is None:
            yield
            return
        claim = Claim(location.storage, _own_id(location.path), silence_s=silence_s)
        claim.take()
        stop = threading.Event()
        thread = threading.Thread(target=claim.beat, args=(stop, beat_s), name="claim", daemon=True)
        thread.start()
        _held[location.run_dir] = claim
        try:
            yield
        finally:
            del _held[location.run_dir]
            stop.set()
            thread.join(2 * beat_s)
            claim.give_back()


def check_held(run_dir: str) -> None:
    """Raises StorageError if this process claimed the run of `run_dir`, and another process has taken it over."""
    for run, claim in _held.items():
        if f"{run_dir.partition('?')[0]}/".startswith(f"{run.partition('?')[0].rstrip('/')}/"):
            claim.check()


class Claim:
    """One driver's claim on one run. `beat` is for a thread of its own."""

    def __init__(self, run: Storage, own: str, *, silence_s: float) -> None:
        self._run = run
        self._claims = run.at(CLAIMS)
        self._name = f"{own}.json"
        self._silence_s = silence_s
        self._content: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.time(),
            "command": sys.argv,
            "term": 0,  # until the run is ours; the holder's term is higher
        }
        self._written_at = 0.0
        self._lost = False

    def take(self) -> None:
        """Raises UserError if there is another valid claim, or if nothing can be written."""
        once = Storage(self._claims.uri, 0.0)  # the error comes before anything starts, as in `RunLocation.check`
        try:
            self._write(once)
            entries = once.entries()
            others = {name: self._silence(entries, name) for name in entries if name != self._name}
            living = {name: silent for name, silent in others.items() if silent < self._silence_s}
            if living:
                name = min(living, key=lambda name: living[name])
                said = self._describe(self._read(name), living[name])
                once.remove(self._name)
                raise UserError(said)
            if others:
                logger.warning("%s: taken over from %s, which is silent", self._run, ", ".join(others))
            self._content["term"] = 1 + max((self._read(name).get("term", 0) for name in others), default=0)
            self._write(once)
            once.remove(*others)
        except StorageError as error:
            raise UserError(f"run_dir: {error}") from error

    def beat(self, stop: threading.Event, beat_s: float) -> None:
        """Writes the claim again every `beat_s` until `stop` is set or another has taken the run."""
        while not stop.wait(beat_s):
            try:
                if _now() - self._written_at > self._silence_s / 2:
                    self.check()  # it was paused, or the storage didn't answer: another driver may have removed the claim
                self._write(Storage(self._claims.uri, beat_s))
            except (StorageError, OSError) as error:
                logger.warning("%s: the claim could not be written again: %s", self._run, error)
                if self._lost:
                    return

    def check(self) -> None:
        """Raises StorageError if another has taken the run."""
        entries = self._claims.entries()
        newer = [
            found
            for name in entries
            if name != self._name and (found := self._read(name)).get("term", 0) > self._content["term"]
        ]
        if newer or self._name not in entries:
            self._lost = True
            by = f" by process {newer[0].get('pid')} on {newer[0].get('host')}" if newer else ""
            raise StorageError(
                f"this process gave no sign of life for {self._silence_s:.0f} s, and {self._run} was taken over{by}: it "
                "writes nothing more there"
            )

    def give_back(self) -> None:
        if not self._lost:
            try:
                self._claims.remove(self._name)
            except (StorageError, OSError) as error:
                logger.warning(
                    "%s: the claim could not be removed (%s); it ends by itself after %.0f s",
                    self._run, error, self._silence_s,
                )  # fmt: skip

    def _write(self, claims: Storage) -> None:
        claims.write(self._name, json.dumps(self._content | {"time": time.time()}).encode())
        self._written_at = _now()

    def _silence(self, entries: dict[str, Entry], name: str) -> float:
        """Seconds since that claim was written, by the storage's clock if it gives a time."""
        ours, theirs = (entries[n].mtime_ns if n in entries else None for n in (self._name, name))
        if ours is not None and theirs is not None:
            return max(0.0, (ours - theirs) / 1e9)
        return max(0.0, time.time() - float(self._read(name).get("time", 0.0)))

    def _read(self, name: str) -> dict[str, Any]:
        """A claim's content; empty if it is gone or isn't one of AutoTraj's."""
        try:
            found = json.loads(self._claims.read(name))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _describe(self, other: dict[str, Any], silent: float) -> str:
        since = other.get("since")
        minutes = f", started {(time.time() - since) / 60:.0f} minutes ago" if isinstance(since, float) else ""
        command = " ".join(["autotraj", *map(str, other.get("command", [])[1:])])
        return (
            f"run_dir: {self._run} is in use by process {other.get('pid')} on {other.get('host')} (`{command}`{minutes}), "
            f"which gave its last sign of life {silent:.0f} s ago; wait until it ends, stop it, or choose another run_dir. "
            f"If it is dead, the run is free once it has been silent for {self._silence_s:.0f} s"
        )


def _own_id(folder: Path) -> str:
    """The same name for all processes that work in this folder; `lock` allows one at a time."""
    file = folder / ID_FILE
    if not file.is_file():
        file.write_text(uuid.uuid4().hex)
    return f"{socket.gethostname()}-{file.read_text()}"


def _now() -> float:
    """Seconds on a clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
