"""Measures what each slot of a container uses, and keeps one slot's processes from taking the CPU of the others.

A container has one control group, in which all threads have the same weight: next to sixteen busy processes of one call,
another call would get a seventeenth. So while at least two slots need CPU, the niceness of a slot's threads is raised until
all of them together have about the weight of one share. A CPU quota stops all threads of a container at once; so if the
container may use fewer cores than the machine has, the slot is also kept to its share of the cores. None of this needs a
privilege: it is done under the slot's own uid, and the system call filter keeps code from doing or undoing it itself.

Without a privilege niceness can't be lowered again. So the main thread of a call, or of a session, keeps its niceness, and
what it starts later begins with that. Only if it keeps starting processes faster than they are found, it is raised too.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, field

from tool_sandbox.image.cleaning import acting_for

NICENESS = 5
"""The niceness of code compared with the runner, so that busy code can't keep the runner from starting and ending calls."""

STEP = 1.25
"""By which one step of niceness divides the CPU that a thread gets against others (sched(7))."""

MAX_NICENESS = 19
RESTARTS = 3
"""If so many examinations in a row found new runnable processes, the niceness of the process that starts them rises, too."""


@dataclass(slots=True)
class Usage:
    """What one slot uses at one moment. Zombies don't count."""

    leader: int = 0  # the call's own process; 0 if none runs
    parent: int = 0  # the zygote that forked it
    threads: dict[int, bytes] = field(default_factory=dict)  # and their states, as proc(5) names them
    switches: int = 0  # how often processes left a core so far; if it rises, one has run
    anon_bytes: int = 0  # memory of its processes, without what they share with the zygote

    @property
    def num_runnable(self) -> int:
        return sum(state == b"R" for state in self.threads.values())

    @property
    def awake(self) -> bool:
        """Whether at least one process isn't stopped."""
        return any(state in (b"R", b"S") for state in self.threads.values())


class Shares:
    """Divides the container's cores among its slots. There is one for a container, in a process with the zygote's rights."""

    def __init__(self, limits: dict[str, int]) -> None:
        self.limits = limits
        self.cores = sorted(os.sched_getaffinity(0))
        self.kept: set[int] = set()  # slots that are kept to some of the cores
        self.restarts: dict[
            int, tuple[int, int]
        ] = {}  # by slot: its leader, and the examinations that found new processes

    def look(self, cleaned: set[int]) -> list[Usage]:
        """What every slot uses, after each was given its share of the CPU.

        Slots of `cleaned` are left out: the cleaner kills all processes with the guard's uid, which this one would have."""
        usages = look(self.limits["uid_base"], self.limits["num_slots"])
        num_busy = sum(usage.num_runnable > 0 for usage in usages)
        for slot, usage in enumerate(usages):
            if slot in cleaned:
                continue
            if num_busy > 1 and usage.num_runnable > 1:
                self.hold_back(slot, usage, num_busy)
            elif slot in self.kept:
                self.kept.discard(slot)
                self.keep_to(slot, usage, self.cores)
        return usages

    def hold_back(self, slot: int, usage: Usage, num_busy: int) -> None:
        niceness = NICENESS + math.ceil(math.log(usage.num_runnable, STEP))
        num_new = 0
        with acting_for(slot, self.limits):
            leader, restarts = self.restarts.get(slot, (0, 0))
            restarts = restarts if leader == usage.leader else 0
            for thread, state in usage.threads.items():
                if thread == usage.leader and restarts < RESTARTS:
                    continue
                with contextlib.suppress(OSError):  # it has ended, or its niceness was raised before
                    num_new += state == b"R" and os.getpriority(os.PRIO_PROCESS, thread) <= NICENESS
                    if niceness > MAX_NICENESS:  # a fifth of the weight of that
                        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
                    os.setpriority(os.PRIO_PROCESS, thread, min(niceness, MAX_NICENESS))
            self.restarts[slot] = (usage.leader, restarts + (num_new > 1))
        num_cores = max(1, self.limits["cpus"] // num_busy)
        if len(self.cores) > self.limits["cpus"] and usage.num_runnable > num_cores:
            # Containers start at different cores, as their uids differ, and so do the slots of one.
            first = self.limits["uid_base"] // 32 * self.limits["cpus"] + slot * num_cores
            self.keep_to(slot, usage, [self.cores[(first + i) % len(self.cores)] for i in range(num_cores)])
            self.kept.add(slot)

    def keep_to(self, slot: int, usage: Usage, cores: list[int]) -> None:
        with acting_for(slot, self.limits):
            for thread in usage.threads:
                with contextlib.suppress(OSError):  # it has ended
                    os.sched_setaffinity(thread, cores)


def look(uid_base: int, num_slots: int) -> list[Usage]:
    """Reads /proc, which needs no right. A process that is being forked, and hasn't the slot's uid yet, isn't seen."""
    usages = [Usage() for _ in range(num_slots)]
    anon_before: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or (status := status_of(int(name))) is None:
            continue
        slot = number(status, b"Uid") - uid_base
        if 0 <= slot < num_slots:
            add(usages[slot], int(name), status, anon_before)
    return usages


def add(usage: Usage, pid: int, status: bytes, anon_before: dict[int, int]) -> None:
    states = states_of(pid) if (num_threads := number(status, b"Threads")) > 1 else {pid: text(status, b"State")[:1]}
    states = {thread: state for thread, state in states.items() if state not in (b"Z", b"X")}
    if not states:
        return
    if not usage.leader:  # the first: /proc lists them in the order of their numbers
        usage.leader, usage.parent = pid, number(status, b"PPid")
    if usage.parent not in anon_before:
        zygote = status_of(usage.parent)
        anon_before[usage.parent] = number(zygote, b"RssAnon") if zygote is not None else 0
    usage.threads |= states
    usage.switches += number(status, b"voluntary_ctxt_switches") + number(status, b"nonvoluntary_ctxt_switches")
    usage.anon_bytes += max(0, number(status, b"RssAnon") - anon_before[usage.parent]) * 1024 if num_threads else 0


def status_of(pid: int) -> bytes | None:
    """The fields of its status; None if it has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return file.read()
    except OSError:
        return None


def states_of(pid: int) -> dict[int, bytes]:
    """The fields of each thread of a process."""
    states = {}
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                states[int(thread)] = file.read().rpartition(b")")[2].split(None, 1)[0]
    return states


def text(status: bytes, name: bytes) -> bytes:
    _, found, rest = status.partition(b"\n" + name + b":")
    return rest.split(b"\n", 1)[0].strip() if found else b""


def number(status: bytes, name: bytes) -> int:
    """The field's value; 0 if it is missing: a process without memory has no RssAnon."""
    words = text(status, name).split(None, 1)
    return int(words[0]) if words else 0
