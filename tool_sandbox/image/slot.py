"""One uid of a container and the call that it runs. Also finds the status of a call whose process has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass, field

from tool_sandbox.image.call import EXIT_MEMORY

NEVER = float("inf")
PIPE_BYTES = 256 * 1024
OOM_COUNTERS = ("/sys/fs/cgroup/memory/memory.oom_control", "/sys/fs/cgroup/memory.events")
MEMORY_COUNTERS = ("/sys/fs/cgroup/memory/memory.stat", "/sys/fs/cgroup/memory.stat")


@dataclass(slots=True)
class Slot:
    """`call_id` is None between a call's answer and the end of its cleaning."""

    number: int
    kind: str = ""
    call_id: int | None = None
    verdict: str = ""  # the status, if the runner ends the call
    reason: str = ""  # its explanation
    peak_bytes: int = 0  # the most memory that was seen
    paused: float = NEVER  # when a session was stopped, between its cells
    settled: int | None = None  # `Usage.switches` when the session was still
    started: float = 0.0
    oom_kills: int = 0  # in the container, before the call
    soft_deadline: float = NEVER
    deadline: float = NEVER
    interrupting: bool = False  # SIGINT was ordered; it must not reach the next call
    output_fd: int = -1
    output: bytearray = field(default_factory=bytearray)
    control: socket.socket | None = None  # of an open session
    exited: bool = True
    cleaning_until: float = NEVER

    def read_output(self, max_bytes: int) -> bool:
        """Read the pipe; True if there were more than `max_bytes` in all. It must never be full, or the code would hang.

        Reads at most one pipe's size at once, so that endless output of one call doesn't keep the others waiting."""
        left = PIPE_BYTES
        while self.output_fd >= 0 and left > 0:
            try:
                data = os.read(self.output_fd, left)
            except BlockingIOError:
                return False
            if not data:
                self.close_output()
                return False
            left -= len(data)
            room = max_bytes - len(self.output)
            self.output += data[: max(room, 0)]
            if len(data) > room and self.call_id is not None:
                return True
        return False

    def judge(self, report: dict[str, object], share_bytes: int, *, alone: bool) -> tuple[str, str]:
        """Status and explanation of a call whose process ended, from what the zygote reports.

        `share_bytes` is the memory that a call may use; `alone` means that no other call was in the container."""
        if self.verdict:
            return self.verdict, self.reason
        if "error" in report:
            return "unavailable", f"the container could not start a process: {report['error']}"
        status = int(str(report["status"]))
        num_killed = oom_kills() - self.oom_kills
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGKILL and num_killed > 0:
                if alone or self.peak_bytes > share_bytes:
                    return "memory", "The kernel killed it, as its container was out of memory."
                return (
                    "crowded_out",
                    "the kernel killed it, as other calls had used up its container's memory; run it again",
                )
            return "error", f"the code was ended by signal {number} ({signal.strsignal(number)})"
        code = os.waitstatus_to_exitcode(status)
        if code == EXIT_MEMORY:
            return "memory", ""
        if code == 0:
            return "ok", ""
        # Perhaps they were its children, as in a pool of workers. Those of other calls count, too, so it is only a hint.
        hint = f"; {num_killed} processes of its container were killed for memory meanwhile" if num_killed > 0 else ""
        return "error", f"exit code {code}{hint}"

    def close_output(self) -> None:
        if self.output_fd >= 0:
            os.close(self.output_fd)
            self.output_fd = -1

    def close_control(self) -> None:
        if self.control is not None:
            self.control.close()
            self.control = None


def used_bytes() -> int:
    """Memory of this container that the kernel can't reclaim: of processes, and files in memory. For cgroup v1 and v2."""
    for path in MEMORY_COUNTERS:
        with contextlib.suppress(OSError), open(path) as file:
            counters = {name: int(value) for name, value in (line.split() for line in file)}
            return sum(counters.get(name, 0) for name in ("rss", "anon", "shmem"))
    return 0


def oom_kills() -> int:
    """How many processes of this container the kernel has killed for memory; cgroup v1 and v2."""
    for path in OOM_COUNTERS:
        with contextlib.suppress(OSError), open(path) as file:
            return int(dict(line.split() for line in file).get("oom_kill", 0))
    return 0
