"""What a container runs: takes calls on stdin, has zygotes fork them, and answers on stdout.

    gateway ──call, cancel──▶ runner (root, SETUID and SETGID only) ──order──▶ zygote ──fork──▶ call (a slot's uid)
            ◀──result, free──        ◀──output pipe, wait4 status───────────────┘

Frames are a 4-byte big-endian length and JSON. A result's status comes from wait4. Its output is data from a separate pipe,
so code can't write a frame. The answer is sent before the slot is cleaned. A slot is free again when nothing of the call is
left. If a slot can't be cleaned, the container ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time

from tool_sandbox.image.call import EXIT_MEMORY
from tool_sandbox.image.slot import NEVER, PIPE_BYTES, Slot, oom_kills, used_bytes

PROTOCOL = 3
"""The runner sends this when it is ready; the gateway must have the same. Raise it with every change of a frame, or of what
the runner needs of its container."""

MAX_FRAME_BYTES = 8 * 1024 * 1024
KEPT_ENVIRONMENT = (
    "PATH",
    "LANG",
    "PYTHONPATH",
    "PYTHONDONTWRITEBYTECODE",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MALLOC_ARENA_MAX",
    "LOKY_MAX_CPU_COUNT",
    "MPLBACKEND",
    "PYTHONINTMAXSTRDIGITS",
    "TQDM_MININTERVAL",
)
"""Code may only see these variables of the environment, where Docker may have put a proxy's password."""

CLEAN_DEADLINE_S = 10.0
"""If a slot isn't clean after this, the container is given up."""

SOFT_S = 0.25
"""A call gets SIGINT this long before its deadline, or a fifth of its time if that is less. Python can then end it in order,
with all that it and its children have printed. SIGKILL comes at the deadline."""

LOOK_S = 0.05
"""How often the slots are examined while a call runs that is older than this, and until a stopped session is still."""
IDLE_LOOK_S = 0.5
"""How often a session that is still is examined again."""
LOOK_PAUSE = 4
"""The time until the next examination is at least this many times the duration of the last one."""
SETTLE_S = 5.0
"""If a session's processes aren't still this long after they were stopped, it is ended."""
MIB = 1 << 20


class Runner:
    """One thread, one `poll`: the gateway, the zygotes, every call's output and every session's control socket."""

    def __init__(self, limits: dict[str, int]) -> None:
        self.limits = limits
        self.slots = [Slot(number) for number in range(limits["num_slots"])]
        self.inbox = bytearray()
        self.zygotes = {kind: self.spawn(kind) for kind in ("cold", "warm")}
        self.starting = set(self.zygotes)
        self.looking_since = NEVER  # the cold zygote has been asked
        self.may_look = 0.0  # not before
        self.missing: list[str] = []  # modules that could not be preloaded

    def spawn(self, kind: str) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        module = "tool_sandbox.image.zygote"  # its module is found in the working directory, as this one was
        command = [sys.executable, "-m", module, kind, json.dumps(self.limits), str(theirs.fileno())]
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ},
        )
        theirs.close()
        return ours

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while True:
            poll = select.poll()
            sources: dict[int, tuple[str, Slot | str | None]] = {0: ("gateway", None)}
            for kind, zygote in self.zygotes.items():
                sources[zygote.fileno()] = ("zygote", kind)
            for slot in self.slots:
                if slot.output_fd >= 0:
                    sources[slot.output_fd] = ("output", slot)
                if slot.control is not None:
                    sources[slot.control.fileno()] = ("control", slot)
            for fd in sources:
                poll.register(fd, select.POLLIN)
            # Output before status and control: what was printed before the end belongs to the answer.
            ready = sorted(poll.poll(self.wait_ms()), key=lambda event: sources[event[0]][0] != "output")
            for fd, _ in ready:
                what, who = sources[fd]
                if what == "gateway":
                    self.on_gateway()
                elif what == "zygote":
                    assert isinstance(who, str)
                    self.on_zygote(who)
                elif isinstance(who, Slot) and what == "output" and who.output_fd == fd:
                    self.drain(who)
                elif isinstance(who, Slot) and who.control is not None and who.control.fileno() == fd:
                    self.on_control(who)
            self.on_time()

    def wait_ms(self) -> float:
        nearest = min(min(slot.soft_deadline, slot.deadline, slot.cleaning_until) for slot in self.slots)
        nearest = min(nearest, self.next_look())
        return max(0.0, min(nearest - time.monotonic(), 60.0)) * 1000 + 1

    def on_time(self) -> None:
        now = time.monotonic()
        for slot in self.slots:
            if slot.cleaning_until < now:
                sys.exit(f"slot {slot.number} can't be cleaned")
            if slot.soft_deadline < now and slot.call_id is not None:
                slot.soft_deadline = NEVER
                self.interrupt(slot)
            if slot.deadline < now and slot.call_id is not None:
                slot.deadline = NEVER
                self.kill(slot, "timeout")
        if self.next_look() < now:
            self.looking_since = now
            self.zygotes["cold"].send(b'{"op": "look"}')

    # -- shares of CPU and memory, and sessions that aren't still (shares.py) ---------------------------------------

    def next_look(self) -> float:
        """When the zygote examines again what the slots use. Never for calls that end quickly."""
        if self.looking_since < NEVER:
            return NEVER
        wanted = NEVER
        for slot in self.slots:
            if slot.call_id is not None:
                wanted = min(wanted, slot.started + LOOK_S)
            elif slot.paused < NEVER:
                wanted = min(wanted, slot.paused + LOOK_S if slot.settled is None else self.may_look + IDLE_LOOK_S)
        return max(wanted, self.may_look)

    def on_look(self, usages: list[tuple[bool, int, int]]) -> None:
        asked, now = self.looking_since, time.monotonic()
        self.looking_since, self.may_look = NEVER, now + max(LOOK_S, LOOK_PAUSE * (now - asked))
        for slot, (awake, switches, anon_bytes) in zip(self.slots, usages, strict=True):
            if slot.call_id is not None:
                slot.peak_bytes = max(slot.peak_bytes, anon_bytes)
            elif slot.paused < asked:
                self.on_paused(slot, awake, switches, now)
        self.make_room([anon_bytes for _, _, anon_bytes in usages])

    def on_paused(self, slot: Slot, awake: bool, switches: int, now: float) -> None:
        """Stops a session between its cells until it is still, and ends it if it isn't, or if it runs again."""
        if slot.settled is not None:
            if awake or switches > slot.settled:  # by a timer that sends SIGCONT, for example
                self.kill(slot, "error")
        elif not awake:
            slot.settled = switches
        elif now > slot.paused + SETTLE_S:
            self.kill(slot, "error")
        else:
            self.order(slot, "stop")

    def make_room(self, used: list[int]) -> None:
        """If the container has less memory left than one call may use, end the call that uses most, if that is more than its
        share. The kernel would end the biggest process instead, perhaps one of another call that keeps to its share."""
        share = self.limits["memory_bytes"]
        greediest = max(range(len(used)), key=used.__getitem__)
        if used[greediest] <= share or self.limits["container_bytes"] - used_bytes() > share:
            return
        reason = f"Its processes took {used[greediest] // MIB} MiB together, and its container had little left."
        self.kill(self.slots[greediest], "memory", reason)

    # -- the gateway ------------------------------------------------------------------------------------------------

    def on_gateway(self) -> None:
        data = os.read(0, 1 << 20)
        if not data:
            sys.exit(0)  # the gateway is gone
        self.inbox += data
        while len(self.inbox) >= 4:
            (length,) = struct.unpack_from(">I", self.inbox)
            if length > MAX_FRAME_BYTES:
                sys.exit("frame too long")
            if len(self.inbox) < 4 + length:
                return
            frame = json.loads(self.inbox[4 : 4 + length])
            del self.inbox[: 4 + length]
            slot = self.slots[frame["slot"]]
            if frame["op"] == "call":
                self.on_call(slot, frame)
            elif frame["op"] == "cancel" and (slot.call_id == frame["id"] or frame["id"] is None):
                self.kill(slot, "cancelled")

    def send(self, **frame: object) -> None:
        data = json.dumps(frame).encode()
        view = memoryview(struct.pack(">I", len(data)) + data)
        while view:
            view = view[os.write(1, view) :]

    # -- a call -----------------------------------------------------------------------------------------------------

    def on_call(self, slot: Slot, frame: dict[str, object]) -> None:
        slot.call_id = int(str(frame["id"]))
        slot.started = time.monotonic()
        slot.oom_kills = oom_kills()
        slot.peak_bytes = 0
        slot.output.clear()
        if not frame["fresh"] and (slot.control is None or slot.verdict or slot.exited):
            # The session's process ended, or is being killed. The caller must hear that its state is gone.
            self.answer(slot, "gone", "")
            if slot.kind:
                self.kill(slot, "cancelled")
            return
        timeout_s = float(str(frame["timeout_s"]))
        slot.deadline = slot.started + timeout_s
        slot.soft_deadline = slot.deadline - min(SOFT_S, timeout_s / 5)
        code_fd = os.memfd_create("code", os.MFD_CLOEXEC)
        with open(code_fd, "wb") as file:
            file.write(str(frame["code"]).encode("utf-8", "replace"))
            file.flush()
            if slot.control is None:
                self.begin(slot, str(frame["kind"]), bool(frame["session"]), code_fd)
            else:
                slot.paused, slot.settled = NEVER, None
                self.order(slot, "continue")
                with contextlib.suppress(OSError):  # its process has just died, and the status will come
                    socket.send_fds(slot.control, [b"c"], [code_fd])

    def begin(self, slot: Slot, kind: str, session: bool, code_fd: int) -> None:
        slot.kind, slot.verdict, slot.reason, slot.exited = kind, "", "", False
        slot.output_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write_fd, True)
        # For `/dev/stdout`, which opens the pipe anew: by a process's own link only, and never to read from it.
        os.fchmod(write_fd, 0o222)
        with contextlib.suppress(OSError):  # the kernel limits it for all containers together; it is only slower then
            fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        fds = [code_fd, write_fd]
        theirs = None
        if session:
            slot.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            fds.append(theirs.fileno())
        order = {"op": "run", "slot": slot.number, "session": session}
        socket.send_fds(self.zygotes[kind], [json.dumps(order).encode()], fds)
        os.close(write_fd)
        if theirs is not None:
            theirs.close()

    def drain(self, slot: Slot) -> None:
        if slot.read_output(self.limits["max_output_bytes"]):
            self.kill(slot, "output_limit")

    def interrupt(self, slot: Slot) -> None:
        """Sends SIGINT. Even if the code catches it, its time is over."""
        slot.verdict = slot.verdict or "timeout"
        if slot.kind and slot.cleaning_until == NEVER:
            slot.interrupting = True
            self.order(slot, "interrupt")

    def kill(self, slot: Slot, verdict: str, reason: str = "") -> None:
        """Has all processes of the slot's uid killed, by a process that has this uid: no other may do so."""
        if not slot.verdict:
            slot.verdict, slot.reason = verdict, reason
        if slot.kind and slot.cleaning_until == NEVER:
            self.clean(slot)

    def clean(self, slot: Slot) -> None:
        slot.cleaning_until = time.monotonic() + CLEAN_DEADLINE_S
        slot.paused = NEVER  # no more stop orders: the cleaner would kill the zygote that acts for the slot
        self.order(slot, "clean")

    def order(self, slot: Slot, op: str) -> None:
        # To the cold zygote, even if the other one forked the call: the cold one forks faster.
        self.zygotes["cold"].send(json.dumps({"op": op, "slot": slot.number}).encode())

    def on_zygote(self, kind: str) -> None:
        data = self.zygotes[kind].recv(4096)
        if not data:
            sys.exit(f"the {kind} zygote died")
        message = json.loads(data)
        if message["op"] == "ready":
            self.starting.discard(kind)
            self.missing += message["missing"]
            if not self.starting:
                self.send(op="ready", protocol=PROTOCOL, missing=self.missing)
            return
        if message["op"] == "look":
            self.on_look(message["slots"])
            return
        slot = self.slots[message["slot"]]
        if message["op"] == "run":
            self.drain(slot)
            slot.exited = True
            alone = not any(other.kind for other in self.slots if other is not slot)
            self.answer(slot, *slot.judge(message, self.limits["memory_bytes"], alone=alone))
            if slot.cleaning_until == NEVER:
                self.clean(slot)
        elif message["op"] == "interrupt":
            slot.interrupting = False
        elif slot.exited and not slot.interrupting and message.get("status") == 0:
            self.release(slot)
        else:
            # The call had not taken its uid when the kill came, or its status hasn't come yet, or it killed the cleaner: try
            # again, until `cleaning_until`.
            time.sleep(0.001)
            self.order(slot, "clean")

    def on_control(self, slot: Slot) -> None:
        """A session's cell ended; its process waits for the next one."""
        assert slot.control is not None
        try:
            data = slot.control.recv(1)
        except OSError:
            data = b""
        if not data:
            slot.close_control()  # the process ended: its status comes from wait4
            return
        self.drain(slot)
        if slot.call_id is None:
            self.kill(slot, "error")  # it sent an answer without a request
            return
        status = {0: "ok", EXIT_MEMORY: "memory"}.get(data[0], "error")
        if slot.verdict:
            self.kill(slot, slot.verdict)  # interrupted: the answer comes with the status of its process
            return
        self.answer(slot, status, "")
        # Nothing of it may run until the next cell, even if its report of the end was false.
        self.order(slot, "stop")
        slot.paused, slot.settled = time.monotonic(), None

    def answer(self, slot: Slot, status: str, message: str) -> None:
        if slot.call_id is None:
            return
        self.send(
            op="result",
            id=slot.call_id,
            slot=slot.number,
            status=status,
            message=message,
            output=slot.output.decode("utf-8", "replace"),
            duration_s=time.monotonic() - slot.started,
            ended=slot.exited or status == "gone",  # of a session: its state is gone
        )
        slot.call_id, slot.soft_deadline, slot.deadline = None, NEVER, NEVER
        slot.output.clear()

    def release(self, slot: Slot) -> None:
        slot.close_output()
        slot.close_control()
        slot.kind, slot.verdict, slot.reason, slot.cleaning_until = "", "", "", NEVER
        self.send(op="free", slot=slot.number)


def close_terminals() -> None:
    """Closes pseudo-terminals to calls: the machine has only a few thousand for all containers. Root owns the file here."""
    with contextlib.suppress(FileNotFoundError):
        os.chmod("/dev/pts/ptmx", 0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    close_terminals()
    with contextlib.suppress(BrokenPipeError):
        Runner(json.loads(sys.argv[1])).run()


if __name__ == "__main__":
    main()
