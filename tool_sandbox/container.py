"""One warm, hardened container and the conversation with its runner.

The gateway holds the container's stdin and stdout: closing them, or dying, ends it. Everything here is asyncio; a call is a
future that the reader resolves, and a container's death resolves all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tool_sandbox import left_behind
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import RunnerError

logger = logging.getLogger(__name__)

MIB = 1 << 20
MAX_FRAME_BYTES = 64 * MIB
SPARE_PROCESSES = 16  # supervisor, zygotes and cleaners, besides the calls' own
BASELINE_MIB = 256  # supervisor and zygotes
STOP_TIMEOUT_S = 10.0
# RLIMIT_NPROC counts a uid's processes over all containers of the kernel: every container has uids of its own.
UID_STRIDE = 32
_uid_blocks = itertools.count(random.randrange(1 << 20))


@dataclass(frozen=True, slots=True)
class Reply:
    """What the runner says of a call."""

    status: str
    message: str
    output: str
    duration_s: float
    ended: bool  # of a session's cell: the process, and with it the state, is gone


class SessionLost(Exception):
    """The session to resume ended by itself before its next cell arrived; nothing was run."""


class Container:
    """Started by `start`; `call` until `dead`; `stop`."""

    def __init__(self, name: str, image: str, config: SandboxConfig, on_free: Callable[[Container, int], None]) -> None:
        """`on_free` is called when a slot that was in use is clean again."""
        self.name = name
        self._image = image
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready = asyncio.Event()
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._ids = itertools.count()
        self.free: set[int] = set()  # none before it is ready
        self._on_free = on_free
        self._death = asyncio.Event()
        self.cause_of_death = ""

    def __repr__(self) -> str:
        return f"container {self.name}"

    @property
    def dead(self) -> bool:
        return bool(self.cause_of_death)

    async def wait_dead(self) -> None:
        await self._death.wait()

    async def start(self) -> None:
        """Run the container and wait until its zygotes are up; RunnerError after `start_timeout_s`."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *docker_command(self.name, self._image, self._config),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the gateway, which stops its containers in order
            )
        except OSError as error:
            raise RunnerError(f"{self!r} did not start: {error}") from error
        self._tasks = [asyncio.create_task(self._read_frames()), asyncio.create_task(self._read_errors())]
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait(
            {ready, self._tasks[0]}, timeout=self._config.start_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        ready.cancel()
        if not self._ready.is_set():
            cause = self.cause_of_death or f"it was not ready within {self._config.start_timeout_s:.0f} s"
            await self.stop()
            raise RunnerError(f"{self!r} did not start: {cause}")

    async def call(
        self, slot: int, kind: str, code: str, timeout_s: float, *, session: bool = False, resume: bool = False
    ) -> Reply:
        """Run `code` in `slot`, as a call of its own, as the first cell of a session or as a further one (`resume`).
        Cancelling kills it. RunnerError if the container dies or misses the deadline, SessionLost if there is no session
        to resume."""
        call_id = next(self._ids)
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            if self.dead:
                raise RunnerError(f"{self!r} died: {self.cause_of_death}")
            order = {"kind": kind, "code": code, "timeout_s": timeout_s, "session": session, "resume": resume}
            self._send(op="call", id=call_id, slot=slot, **order)
            # The runner kills at `timeout_s`; if it doesn't answer well after, it hangs.
            return await asyncio.wait_for(asyncio.shield(future), timeout_s + STOP_TIMEOUT_S)
        except TimeoutError:
            self._die(f"its runner did not answer a call {STOP_TIMEOUT_S:.0f} s after the call's deadline")
            raise RunnerError(f"{self!r}: {self.cause_of_death}") from None
        except asyncio.CancelledError:
            self._send(op="cancel", id=call_id, slot=slot)
            raise
        finally:
            self._calls.pop(call_id, None)

    def end_session(self, slot: int) -> None:
        """Kill what runs in `slot`; it becomes free when it is clean."""
        self._send(op="cancel", id=None, slot=slot)

    async def stop(self) -> None:
        """End the container; SIGKILL if it hasn't gone in time."""
        self._die("it was stopped")
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                killer = await asyncio.create_subprocess_exec(
                    "docker", "kill", self.name, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
                )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(killer.wait(), STOP_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()

    def _send(self, **frame: Any) -> None:
        if self._process is None or self._process.stdin is None or self.dead:
            return
        data = json.dumps(frame).encode()
        # Not awaited: a call is small against the transport's buffer, and the slots bound how many there are.
        self._process.stdin.write(struct.pack(">I", len(data)) + data)

    def _die(self, cause: str) -> None:
        if self.dead:
            return
        self.cause_of_death = cause
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # the runner ends when it reads the end
        for future in self._calls.values():
            if not future.done():
                future.set_exception(RunnerError(f"{self!r} died: {cause}"))
                future.exception()  # retrieved: a cancelled caller won't
        self.free.clear()
        self._death.set()

    async def _read_frames(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            while True:
                (length,) = struct.unpack(">I", await self._process.stdout.readexactly(4))
                if length > MAX_FRAME_BYTES:
                    raise RunnerError(f"{self!r} sent a frame of {length} bytes")
                self._on_frame(json.loads(await self._process.stdout.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._die("its runner ended")
        except (RunnerError, ValueError, KeyError) as error:
            self._die(f"it broke the protocol: {error}")

    def _on_frame(self, frame: dict[str, Any]) -> None:
        if frame["op"] == "ready":
            self.free = set(range(self._config.slots_per_container))
            self._ready.set()
        elif frame["op"] == "free":
            self.free.add(frame["slot"])
            self._on_free(self, frame["slot"])
        elif frame["op"] == "lost":
            future = self._calls.get(frame["id"])
            if future is not None and not future.done():
                future.set_exception(SessionLost())
                future.exception()
        elif frame["op"] == "result":
            future = self._calls.get(frame["id"])
            if future is not None and not future.done():
                future.set_result(
                    Reply(frame["status"], frame["message"], frame["output"], frame["duration_s"], frame["ended"])
                )

    async def _read_errors(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            logger.warning("%r: %s", self, line.decode("utf-8", "replace").rstrip()[:500])


def docker_command(name: str, image: str, config: SandboxConfig) -> list[str]:
    """`docker run` with everything off that a call doesn't need."""
    uid_base = 1_000_000 + (next(_uid_blocks) % (1 << 20)) * UID_STRIDE
    limits = {
        "num_slots": config.slots_per_container,
        "uid_base": uid_base,
        "memory_bytes": config.memory_mib * MIB,
        "scratch_bytes": config.scratch_mib * MIB,
        "max_processes": config.max_processes,
        "max_output_bytes": config.max_output_bytes,
    }
    memory_mib = BASELINE_MIB + config.slots_per_container * (config.memory_mib + config.scratch_mib)
    tmpfs = [
        f"/w/{slot}:size={config.scratch_mib}m,nr_inodes=4096,nosuid,nodev,mode=0700,uid={uid},gid={uid}"
        for slot, uid in enumerate(range(uid_base, uid_base + config.slots_per_container))
    ]
    command = ["docker", "run", "--rm", "--interactive", "--init", "--name", name, "--label", left_behind.own_label()]
    command += ["--network", "none", "--ipc", "private", "--shm-size", "16m", "--read-only", "--log-driver", "none"]
    command += ["--tmpfs", "/tmp:size=16m,nr_inodes=4096,nosuid,nodev"]
    for mount in tmpfs:
        command += ["--tmpfs", mount]
    command += ["--cap-drop", "ALL", "--cap-add", "SETUID", "--cap-add", "SETGID"]
    command += ["--security-opt", "no-new-privileges"]
    command += ["--pids-limit", str(config.slots_per_container * config.max_processes + SPARE_PROCESSES)]
    command += ["--memory", f"{memory_mib}m", "--memory-swap", f"{memory_mib}m", "--cpus", str(config.cpus)]
    command += ["--ulimit", "nofile=4096", "--ulimit", "core=0"]
    # System V objects and message queues would outlive the processes that made them.
    for setting in ("kernel.shmmni=0", "kernel.msgmni=0", "kernel.sem=250 32000 32 0", "fs.mqueue.queues_max=0"):
        command += ["--sysctl", setting]
    return [*command, image, json.dumps(limits)]
