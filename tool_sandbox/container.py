"""One warm, hardened container and the communication with its runner.

The gateway holds the container's stdin and stdout, which the launcher passed to it. The container ends when they are closed,
so also when the gateway dies. Everything here is asyncio: a call is a future that the reader resolves, and when the
container dies, all open futures get an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tool_sandbox import build
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import ImageError, RunnerError
from tool_sandbox.image.runner import PROTOCOL
from tool_sandbox.launcher import Launched, Launcher
from tool_sandbox.second_look import second_look
from trajectory.types import ToolStatus

logger = logging.getLogger(__name__)

HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = 64 << 20
STOP_TIMEOUT_S = 10.0

ReplyStatus = Literal[ToolStatus, "gone", "crowded_out"]
"""How a call ended. Two are only for the pool: its session was gone, or its neighbours had used up the memory."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The runner's answer to a call."""

    status: ReplyStatus
    message: str
    output: str
    duration_s: float
    ended: bool  # for a cell of a session: its process ended, and the state is lost


class Frames(asyncio.Protocol):
    """Splits the bytes of a runner into frames as they arrive. No task waits for frames, so none has to be woken."""

    def __init__(self, on_frame: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        """`on_end` is called once, at the end of the stream, with its error, such as a frame over `MAX_FRAME_BYTES`."""
        self._on_frame, self._on_end = on_frame, on_end
        self._transport: asyncio.BaseTransport | None = None
        self._buffer = bytearray()
        self._error = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                self._error = f"it sent a frame of {length} bytes"
                assert self._transport is not None
                self._transport.close()
                return
            if len(self._buffer) - start - HEADER.size < length:
                break
            start += HEADER.size
            self._on_frame(bytes(self._buffer[start : start + length]))
            start += length
        del self._buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._on_end(self._error)


class Container:
    """A container. Call `start`; then `call` until `dead`; then `stop`."""

    def __init__(
        self, launcher: Launcher, config: SandboxConfig, on_change: Callable[[Container, int | None], None]
    ) -> None:
        """`on_change` is called with a slot that became free, or with None when the container died."""
        self._launcher = launcher
        self._config = config
        self._launched: Launched | None = None
        self._stdin: asyncio.WriteTransport | None = None
        self._outputs: list[asyncio.ReadTransport] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ready = asyncio.Event()
        self._died = asyncio.Event()
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._ids = itertools.count()
        self.free: set[int] = set()  # empty until the container is ready
        self.closing: set[int] = set()  # slots whose session was told to end, and which aren't free yet
        self._last_error = ""
        self._on_change = on_change
        self.cause_of_death = ""

    def __repr__(self) -> str:
        return f"container {self._launched.name}" if self._launched is not None else "a container that isn't started"

    @property
    def dead(self) -> bool:
        return bool(self.cause_of_death)

    async def start(self) -> None:
        """Run the container and wait until its zygotes are ready, at most `start_timeout_s`. Errors: RunnerError; ImageError
        if the image is the user's own."""
        self._launched = await self._launcher.launch()
        loop = asyncio.get_running_loop()
        self._stdin, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(self._launched.stdin, "wb", 0))
        stderr = asyncio.StreamReader()
        await self._read(self._launched.stderr, lambda: asyncio.StreamReaderProtocol(stderr))
        self._tasks = [asyncio.create_task(self._read_errors(stderr))]
        await self._read(self._launched.stdout, lambda: Frames(self._on_data, self._on_end))
        try:
            async with second_look(self._config.start_timeout_s):
                await self._ready.wait()
        except TimeoutError:
            self._die(f"it was not ready within {self._config.start_timeout_s:.0f} s")
        if self.dead and self._config.image:
            raise ImageError(
                f"sandbox.image: {self._config.image} has no working runner: {self.cause_of_death}; make it "
                f"`FROM {build.image_tag()}`, the image of `python -m autotraj sandbox build`, and keep its entry point"
            )
        if self.dead:
            raise RunnerError(f"{self!r} did not start: {self.cause_of_death}")

    async def call(
        self, slot: int, kind: str, code: str, timeout_s: float, *, session: bool = False, fresh: bool = True
    ) -> Reply:
        """Run `code` in `slot`: in a new process if `fresh`, else in that of the session that is open there. Cancelling
        this coroutine kills the code.

        RunnerError if the container dies, or doesn't answer in time, which ends it."""
        if self.dead:
            raise RunnerError(f"{self!r} died: {self.cause_of_death}")
        call_id = next(self._ids)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        self._send(
            op="call", id=call_id, slot=slot, kind=kind, code=code, timeout_s=timeout_s, session=session, fresh=fresh
        )
        try:
            # The runner kills at `timeout_s`. If it hasn't answered some time after that, it hangs.
            async with second_look(timeout_s + STOP_TIMEOUT_S):
                return await future
        except TimeoutError:
            self._die(f"its runner did not answer a call {STOP_TIMEOUT_S:.0f} s after the call's deadline")
            raise RunnerError(f"{self!r} died: {self.cause_of_death}") from None
        except asyncio.CancelledError:
            self._send(op="cancel", id=call_id, slot=slot)
            raise
        finally:
            self._calls.pop(call_id, None)

    def end_session(self, slot: int) -> None:
        """Kill the session in `slot`. The slot becomes free once it is clean."""
        if not self.dead:
            self.closing.add(slot)
            self._send(op="cancel", id=None, slot=slot)

    async def wait_dead(self) -> None:
        """Returns when the container has died, whatever the cause."""
        await self._died.wait()

    async def stop(self) -> None:
        """End the container, with SIGKILL if it doesn't end in time."""
        self._die("it was stopped")
        if self._launched is not None:
            try:
                await asyncio.wait_for(self._launched.ended.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._launcher.kill(self._launched.name)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._launched.ended.wait(), 2 * STOP_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()
        for output in self._outputs:
            output.close()

    def _send(self, **frame: Any) -> None:
        if self._stdin is None or self.dead:
            return
        data = json.dumps(frame).encode()
        # Not awaited: a call is small compared with the transport's buffer, and the slots bound the number of calls.
        self._stdin.write(HEADER.pack(len(data)) + data)

    def _die(self, cause: str) -> None:
        if self.dead:
            return
        self.cause_of_death = cause
        if self._stdin is not None:
            self._stdin.close()  # the runner ends when it reads the end
        for future in self._calls.values():
            if not future.done():
                future.set_exception(RunnerError(f"{self!r} died: {cause}"))
                future.exception()  # mark it as retrieved, since a cancelled caller won't do that
        self._died.set()
        self._ready.set()  # wakes those that wait for it; they then check `dead`
        self._on_change(self, None)

    async def _read(self, descriptor: int, protocol: Callable[[], asyncio.Protocol]) -> None:
        pipe = os.fdopen(descriptor, "rb", 0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(protocol, pipe)
        self._outputs.append(transport)

    def _on_data(self, data: bytes) -> None:
        try:
            self._on_frame(json.loads(data))
        except (RunnerError, ValueError, KeyError, TypeError) as error:
            self._die(f"it broke the protocol: {error}")

    def _on_end(self, error: str) -> None:
        if error:
            self._die(f"it broke the protocol: {error}")
        else:
            self._tasks.append(asyncio.create_task(self._say_why_it_ended()))

    async def _say_why_it_ended(self) -> None:
        # Errors that Docker or the runner wrote. Once in service, calls wait for the answer and Docker itself ends later.
        await asyncio.wait(self._tasks[:1], timeout=0.05 if self._ready.is_set() else 1.0)
        self._die(f"its runner ended{self._last_error and f' ({self._last_error})'}")

    def _on_frame(self, frame: dict[str, Any]) -> None:
        if frame["op"] == "ready":
            if (protocol := frame.get("protocol", 1)) != PROTOCOL:
                raise RunnerError(f"its runner speaks version {protocol} of the protocol, this gateway {PROTOCOL}")
            if frame["missing"]:
                logger.warning(
                    "%r: the image lacks %s: code that imports them fails", self, ", ".join(frame["missing"])
                )
            self.free = set(range(self._config.slots_per_container))
            self._ready.set()
        elif frame["op"] == "free":
            self.free.add(frame["slot"])
            self.closing.discard(frame["slot"])
            self._on_change(self, frame["slot"])
        elif frame["op"] == "result":
            future = self._calls.get(frame["id"])
            if future is not None and not future.done():
                future.set_result(
                    Reply(frame["status"], frame["message"], frame["output"], frame["duration_s"], frame["ended"])
                )

    async def _read_errors(self, stderr: asyncio.StreamReader) -> None:
        async for line in stderr:
            self._last_error = line.decode("utf-8", "replace").strip()[:500] or self._last_error
            logger.warning("%r: %s", self, self._last_error)
