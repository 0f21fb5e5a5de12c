"""What is seen of a slot's processes, and what is done to one that runs many: real processes, under uids of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tool_sandbox.image.slot import Slot

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, os, signal, sys, time
from tool_sandbox.image.shares import NICENESS, Shares
UID = 1_900_200  # no user of this machine
limits = {"uid_base": UID, "num_slots": 2, "cpus": int(sys.argv[1])}
def fork(slot, num_children):
    ready, ready_w = os.pipe()
    if (pid := os.fork()) == 0:
        os.setgroups([])
        os.nice(NICENESS)
        os.setresgid(UID + slot, UID + slot, UID + slot)
        os.setresuid(UID + slot, UID + slot, UID + slot)
        signal.alarm(60)
        for _ in range(num_children):
            if os.fork() == 0:
                signal.alarm(60)
                break
        os.write(ready_w, b"x")
        while True:
            pass
    for _ in range(1 + num_children):
        os.read(ready, 1)
    return pid
leaders = [fork(0, 4), fork(1, 0)]
shares = Shares(limits)
usages = shares.look(set())
seen = [(usage.leader, len(usage.threads), usage.awake) for usage in usages]
nices = [[os.getpriority(os.PRIO_PROCESS, thread) for thread in usage.threads] for usage in usages]
cores = [{len(os.sched_getaffinity(thread)) for thread in usage.threads} for usage in usages]
for usage in usages:
    for pid in usage.threads:
        os.kill(pid, signal.SIGSTOP)
until = time.monotonic() + 30
stopped = shares.look(set())
while any(usage.awake for usage in stopped) and time.monotonic() < until:
    time.sleep(0.01)
    stopped = shares.look(set())
still = shares.look(set())
free = [{len(os.sched_getaffinity(thread)) for thread in usage.threads} for usage in usages]
for usage in usages:
    for pid in usage.threads:
        os.kill(pid, signal.SIGKILL)
print(json.dumps({
    "leaders": seen == [(leaders[0], 5, True), (leaders[1], 1, True)],
    "nices": nices, "stopped": [usage.awake for usage in stopped], "cores": [list(c) for c in cores],
    "free": [list(c) for c in free],
    "switches": [usage.switches for usage in stopped] == [usage.switches for usage in still],
}))
"""


def look(cpus: int) -> dict[str, object]:
    command = [sys.executable, "-c", SCRIPT, str(cpus)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users, as the runner does")
def test_a_slot_that_runs_many_is_made_nicer_beside_one_that_runs_one() -> None:
    """Five spin there: each of them, but for the main one, gets about a fifth of the weight of the neighbour's."""
    found = look(cpus=os.cpu_count() or 1)
    assert found["leaders"]
    (first, *others), neighbour = found["nices"]  # type: ignore[misc]
    assert first == neighbour[0]
    assert len(set(others)) == 1
    assert first < others[0] <= first + 8  # 1.25 ** 8 is 6
    assert found["stopped"] == [False, False]
    assert found["switches"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users, as the runner does")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core can't be divided")
def test_with_a_quota_below_the_cores_such_a_slot_is_kept_to_its_part_while_both_run() -> None:
    found = look(cpus=1)
    assert found["cores"] == [[1], [os.cpu_count()]]
    assert found["free"] == [[os.cpu_count()], [os.cpu_count()]]


def test_an_innocent_call_that_the_kernel_ends_for_memory_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter(range(1, 9))
    monkeypatch.setattr("tool_sandbox.image.slot.oom_kills", lambda: next(counted))
    killed = {"status": 9}
    small, big = Slot(0, peak_bytes=300), Slot(1, peak_bytes=600)
    assert small.judge(killed, 512, alone=False)[0] == "crowded_out"
    assert big.judge(killed, 512, alone=False)[0] == "memory"
    assert small.judge(killed, 512, alone=True)[0] == "memory"  # its children took it, before anyone looked
