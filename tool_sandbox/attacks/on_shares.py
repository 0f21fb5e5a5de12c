"""Attacks on a neighbour's share of the container's CPU and memory. attack.py says how to read them.

The neighbour compares its own CPU time with that of all others in the container. So the machine's speed doesn't matter.
Other load can, as the neighbour has one core and the attack all: it then gets less than its half, but never as little as one
process among many. If slots share no container, it sees no others, and there is nothing to test.
"""

from __future__ import annotations

from tool_sandbox.attacks.attack import Attack

OTHERS = """
def others():
    '''State and CPU seconds, with those of its dead children, of each process of other slots, by their numbers.'''
    found = {}
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            try:
                uid = int(open(f"/proc/{pid}/status").read().split("\\nUid:\\t")[1].split()[0])
                fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
            except OSError:
                continue
            if uid not in (0, os.getuid()):
                found[int(pid)] = fields[0], sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return found
"""

WORK = (
    OTHERS
    + """
until = time.monotonic() + 2
while sum(state == "R" for state, _ in others().values()) < 8 and time.monotonic() < until:
    time.sleep(0.02)
before, mine = others(), time.process_time()
until = time.monotonic() + 2
while time.monotonic() < until:
    pass
mine = time.process_time() - mine
theirs = sum(spent - before.get(pid, ("", 0.0))[1] for pid, (_, spent) in others().items())
if mine < (mine + theirs) / 8:  # a quarter of a fair share; twice what it would get as one of seventeen processes
    print(f"BREACH {mine:.2f} s of CPU beside {theirs:.2f} s of others")
"""
)
"""The code of a neighbour with work of its own, which begins once the attack runs."""

STANDSTILL = (
    OTHERS
    + """
until, still_since, last = time.monotonic() + 15, time.monotonic(), {}
while time.monotonic() < still_since + 2:
    now = {pid: spent for pid, (_, spent) in others().items()}
    if any(spent > last.get(pid, 0.0) for pid, spent in now.items()):
        still_since = time.monotonic()
    if time.monotonic() > until:
        print("BREACH: it runs on", others())
        break
    last = now
    time.sleep(0.1)
print("end")
"""
)
"""Code that checks that processes under other uids stop and stay stopped, or end."""

WAKE = """
import struct
def wake_me(after_s):
    event = ctypes.create_string_buffer(struct.pack("Pii", 0, signal.SIGCONT, 0), 64)
    timer = ctypes.c_void_p()
    assert libc.timer_create(1, event, ctypes.byref(timer)) == 0
    nanoseconds = int(after_s * 1e9)
    assert libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, *divmod(nanoseconds, 10**9)), None) == 0
def spin():
    while True:
        pass
"""
"""Code of a timer whose SIGCONT undoes a stop."""

SHARES = (
    Attack(
        "pool of workers",
        "sixteen processes of a pool take the CPU of a neighbour who has work to do",
        """
import multiprocessing
def work(_):
    while True:
        pass
multiprocessing.Pool(16).map(work, range(16))
""",
        statuses=("timeout",),
        timeout_s=8.0,
        beside=WORK,
    ),
    Attack(
        "hog beside work",
        "as many spinning processes as it may have, and new ones all the time, beside a neighbour's work",
        """
def spin():
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
while True:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    try:
        spawn(spin)
    except OSError:
        pass
""",
        statuses=("timeout",),
        timeout_s=8.0,
        beside=WORK,
    ),
    Attack(
        "spinners of a session",
        "processes that a session's cell forked go on after it has ended",
        "def spin():\n    while True:\n        pass\nspawn(spin, 16)\nprint('end')",
        session=True,
        afterwards=STANDSTILL,
    ),
    Attack(
        "woken spinners",
        "timers that send SIGCONT to what was stopped at the end of a cell, at once and later",
        WAKE
        + """
ready, ready_w = os.pipe()
def wake_and_spin(after_s):
    wake_me(after_s)
    os.write(ready_w, b"x")
    spin()
spawn(lambda: wake_and_spin(0.3), 4)
spawn(lambda: wake_and_spin(1.5), 4)
for _ in range(8):
    os.read(ready, 1)
print("end")
""",
        session=True,
        afterwards=STANDSTILL,
    ),
    Attack(
        "forged end of a cell",
        "a cell says itself that it has ended, and spins on without a deadline",
        WAKE
        + """
import socket, stat
wake_me(0.3)
for fd in range(3, 256):
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            socket.socket(fileno=os.dup(fd)).send(b"\\0")
    except OSError:
        pass
spin()
""",
        statuses=("ok", "error"),
        timeout_s=1.5,
        session=True,
        afterwards=STANDSTILL,
    ),
    Attack(
        "memory beside memory",
        "many processes, each a small one, use up the container's memory beside a neighbour who uses what is his",
        """
def eat():
    x = []
    try:
        while True:
            x.append(bytearray(b"x" * 10**6))
            time.sleep(0.01)
    except MemoryError:
        time.sleep(60)
try:
    spawn(eat, 1000)
except OSError:
    time.sleep(60)
time.sleep(60)
""",
        statuses=("memory",),
        timeout_s=10.0,
        beside="x = bytearray(150 << 20)\nx[::4096] = bytes(len(x) // 4096)\ntime.sleep(0.5)\n",
        crowds_out=True,
    ),
)
