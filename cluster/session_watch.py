"""Notices when this machine's Ray ends, its raylet or its GCS, while a run needs it.

Ray's own library then waits for a minute and ends the process without a Python exception, or it hangs. Here the main thread
gets a `RayDied` at once, whose message says what ended and how to continue. If the exception doesn't leave Ray's library in
time, this process prints the message and ends. If Ray's library ends the process itself, `ray_witness` prints the message.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray

from cluster.main_thread import call_handler, is_unwinding

logger = logging.getLogger(__name__)

DAEMONS = ("raylet", "gcs_server")
REPEAT_EVERY_S = 0.5
UNWIND_TIMEOUT_S = 20.0
"""Time to stop the run's parts without Ray, seconds. Some of them still try to reach it once."""
STOP_TIMEOUT_S = 5.0
WITNESS = Path(__file__).with_name("ray_witness.py")


class RayDied(RuntimeError):
    """Ray's daemons have ended. The message names which, and says how to continue."""


class SessionWatch:
    """Watches the Ray session that this process has just joined or started. Use it as a context around all that needs
    Ray."""

    def __init__(self) -> None:
        node = ray._private.worker._global_node
        self._logs = f"{node.get_session_dir_path()}/logs"
        self._daemons, self._helpers = _processes(node.session_name)
        self._message = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ray-watch", daemon=True)
        self._previous: Any = None
        self._witness: subprocess.Popen[bytes] | None = None

    @property
    def died(self) -> str:
        """The message about the daemon that ended; empty while the daemons live."""
        return self._message

    def __enter__(self) -> SessionWatch:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGUSR1, self._raise)
        words = [word for process in self._daemons for word in (str(process.pid), self._message_of(process))]
        self._witness = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WITNESS), str(os.getpid()), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches only the run
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if not self._message:  # otherwise Ray's library may still end the process during its own shutdown
            self._dismiss_witness()
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)

    def end_helpers(self) -> None:
        """End the raylet's helper processes after Ray's shutdown, as they notice it late (2.60: after minutes), and the
        witness."""
        self._dismiss_witness()
        for process in self._helpers:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(self._helpers, timeout=STOP_TIMEOUT_S)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _look(self) -> None:
        poller, names = select.poll(), dict[int, psutil.Process]()
        for process in self._daemons:
            with suppress(ProcessLookupError):
                names[descriptor := os.pidfd_open(process.pid)] = process
                poller.register(descriptor, select.POLLIN)
        ended: list[psutil.Process] = []
        while not ended and not self._closed.is_set():
            ended = [names[descriptor] for descriptor, _ in poller.poll(1000 * REPEAT_EVERY_S)]
        for descriptor in names:
            os.close(descriptor)
        if ended and not self._closed.is_set():
            self._tell(ended[0])

    def _dismiss_witness(self) -> None:
        """End the witness: this process has printed the message, or there is none."""
        witness, self._witness = self._witness, None
        if witness is not None:
            with suppress(subprocess.TimeoutExpired):
                witness.communicate(b".", timeout=STOP_TIMEOUT_S)

    def _message_of(self, process: psutil.Process) -> str:
        return (
            f"Ray's {_name(process)} (process {process.pid}) has ended, and with it all of the run's actors. What is on "
            "disk is kept: `run` and its stages go on with the same command, `grpo` with --resume RUN_DIR if it has a "
            f"checkpoint. If nobody ended it, its last words are in {self._logs}"
        )

    def _tell(self, process: psutil.Process) -> None:
        self._message = self._message_of(process)
        logger.warning("Ray's %s (process %d) has ended", _name(process), process.pid)
        # Ray would log, with tracebacks, that it can't end actors which are gone.
        logging.getLogger("ray.rllib").setLevel(logging.CRITICAL)
        until = time.monotonic() + UNWIND_TIMEOUT_S
        while True:
            if self._previous is not None:
                call_handler(signal.SIGUSR1)
            if self._closed.wait(REPEAT_EVERY_S):
                return
            if time.monotonic() > until:
                print(f"failed: {self._message}", file=sys.stderr, flush=True)
                self._dismiss_witness()
                os._exit(1)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._message and not is_unwinding(RayDied) and not is_unwinding(KeyboardInterrupt):
            raise RayDied(self._message)


def _name(process: psutil.Process) -> str:
    return "GCS" if process.info["name"].startswith("gcs") else "raylet"


def _processes(session: str) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The processes of a Ray session on this machine: its daemons, and the helpers that a raylet started."""
    of_session = [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] in DAEMONS and session in " ".join(process.info["cmdline"] or [])
    ]
    own = {process.pid for process in psutil.Process().children()}
    helpers = []
    for raylet in of_session:
        if raylet.pid in own:
            with suppress(psutil.NoSuchProcess):
                helpers += [p for p in raylet.children() if "Agent" in " ".join(p.cmdline())]
    # The raylets first: the run's process may end at once by a raylet's death, and ends the GCS with itself.
    return sorted(of_session, key=lambda process: process.info["name"] != "raylet"), helpers
