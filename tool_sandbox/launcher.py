"""The gateway's side of the launcher, which starts its containers. `launcher_process.py` says what the gateway may request.

Call `spawn` while this process may still use the engine, and `connect` in the event loop; then `launch`, `kill`, `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tool_sandbox import errors
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import ContainerEngineError, RunnerError, SandboxError
from tool_sandbox.second_look import second_look

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S = 120.0
"""Time for the launcher to ask the engine for its version and the image, and to remove leftover containers."""
LAUNCH_TIMEOUT_S = 20.0
"""Time for the launcher to fork `docker run`, also on a busy machine."""
CLOSE_TIMEOUT_S = 20.0
MAX_MESSAGE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Launched:
    """A container that is being started: its name, and our ends of its pipes, which the receiver must close."""

    name: str
    stdin: int
    stdout: int
    stderr: int
    ended: asyncio.Event  # set when `docker run` has ended


class Launcher:
    """The launcher of one pool. Its process ends when this object's socket closes, and then removes the containers."""

    def __init__(self, config: SandboxConfig) -> None:
        # Only the settings of a container: the launcher needs no secret.
        self._settings = config.model_copy(
            update={"address": "127.0.0.1:0", "metrics_address": "", "token": "", "tls": None}
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._asked: deque[asyncio.Future[Launched]] = deque()  # they are answered in order
        self._ends: dict[str, asyncio.Event] = {}
        self._ready: asyncio.Future[None] | None = None
        self.broken = ""
        """Why it can't start containers any more; empty as long as it can."""

    def spawn(self) -> None:
        """Start the process, as the user of this process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tool_sandbox.launcher_process", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        ours.send(self._settings.model_dump_json().encode())
        self._control = ours

    async def connect(self) -> None:
        """Wait until the engine and the image are known to be there. Errors: SandboxError, which says what to do."""
        assert self._control is not None, "spawn() first"
        self._control.setblocking(False)
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        loop.add_reader(self._control, self._on_readable)
        try:
            async with second_look(READY_TIMEOUT_S):
                await self._ready
        except TimeoutError:
            raise ContainerEngineError(
                f"sandbox: waited {READY_TIMEOUT_S:.0f} s on the launcher, which waits on Docker; restart dockerd"
            ) from None

    async def launch(self) -> Launched:
        """Start a container with the settings of this launcher. RunnerError if the launcher can't, or is gone."""
        future: asyncio.Future[Launched] = asyncio.get_running_loop().create_future()
        self._send({"op": "start"})
        self._asked.append(future)
        try:
            async with second_look(LAUNCH_TIMEOUT_S):
                return await future
        except TimeoutError:
            raise RunnerError(f"waited {LAUNCH_TIMEOUT_S:.0f} s on the launcher to start a container") from None

    def kill(self, name: str) -> None:
        """Send SIGKILL to the container of that name."""
        with contextlib.suppress(RunnerError):
            self._send({"op": "kill", "name": name})

    async def close(self) -> None:
        """Returns when the process and all its containers are gone."""
        self._hang_up("it was closed")
        if self._process is not None:
            process, self._process = self._process, None
            try:
                await asyncio.to_thread(process.wait, CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(PermissionError):  # it belongs to root, and this process doesn't any more
                    process.kill()

    def _send(self, order: dict[str, str]) -> None:
        if self._control is None:
            raise RunnerError(f"there is no launcher: {self.broken}")
        try:
            self._control.send(json.dumps(order).encode())
        except OSError as error:  # the launcher is gone, or so many orders wait that the buffer is full
            raise RunnerError(f"the launcher takes no orders: {error}") from None

    def _on_readable(self) -> None:
        assert self._control is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 3)
        except BlockingIOError:
            return
        except ConnectionError:
            data, descriptors = b"", []
        if not data:
            self._hang_up("its process ended")
            return
        self._on_message(json.loads(data), descriptors)

    def _on_message(self, message: dict[str, Any], descriptors: list[int]) -> None:
        match message["op"]:
            case "ready":
                self._settle(lambda ready: ready.set_result(None))
            case "broken":
                error = getattr(errors, message["kind"])(message["error"])
                self._settle(lambda ready: ready.set_exception(error))
            case "started":
                stdin, stdout, stderr = descriptors
                launched = Launched(message["name"], stdin, stdout, stderr, asyncio.Event())
                self._ends[launched.name] = launched.ended
                future = self._asked.popleft()
                if future.done():  # its caller has gone; without its input the container ends
                    for descriptor in descriptors:
                        os.close(descriptor)
                else:
                    future.set_result(launched)
            case "failed":
                future = self._asked.popleft()
                if not future.done():
                    future.set_exception(RunnerError(f"the launcher: {message['error']}"))
            case "ended":
                self._ends.pop(message["name"]).set()

    def _settle(self, how: Callable[[asyncio.Future[None]], None]) -> None:
        if self._ready is not None and not self._ready.done():
            how(self._ready)

    def _hang_up(self, cause: str) -> None:
        if self._control is None:
            return
        self.broken = cause
        if self._ready is not None:
            asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        self._control = None
        gone: SandboxError = RunnerError(f"the sandbox's launcher is gone: {cause}")
        self._settle(
            lambda ready: ready.set_exception(ContainerEngineError(f"sandbox: {gone}; its log above says why"))
        )
        for future in self._asked:
            if not future.done():
                future.set_exception(gone)
                future.exception()  # mark it as retrieved: its caller may be gone
        self._asked.clear()
        for ended in self._ends.values():
            ended.set()  # no message about them will come any more
        self._ends.clear()
