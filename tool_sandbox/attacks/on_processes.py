"""Attacks on the runner, on the neighbours' processes and on the machine's resources. attack.py says how to read them."""

from __future__ import annotations

from tool_sandbox.attacks.attack import KILLED, Attack

PROCESSES = (
    Attack(
        "forged reply",
        "the runner's frames and the zygote's orders, written to every descriptor there is; then exit code 7",
        """
import json, struct
frame = json.dumps({"op": "result", "id": 0, "slot": 0, "status": "ok", "message": "forged", "output": "forged",
                    "duration_s": 0.0, "ended": True}).encode()
order = b'{"op": "run", "slot": 0, "status": 0}'
for fd in range(1, 256):
    for data in (struct.pack(">I", len(frame)) + frame, order):
        try:
            os.write(fd, data)
        except OSError:
            pass
for fd in range(3, 256):
    attempt(f"descriptor {fd}", lambda: os.fstat(fd))
for pid in others():
    for fd in range(6):
        attempt(f"descriptor {fd} of {pid}", lambda: os.write(os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY), frame))
print("end", flush=True)
os._exit(7)
""",
        statuses=("error",),
    ),
    Attack(
        "forged cell",
        "in a session: answers for cells that nobody asked for, empty ones, and descriptors, sent to the runner",
        """
import socket, stat
for fd in range(3, 256):
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            control = socket.socket(fileno=os.dup(fd))
    except OSError:
        pass
for data in (b"\\0", b"", b"c", b"\\0" * 4096):
    for _ in range(100):
        try:
            socket.send_fds(control, [data], [0, 1, 2] * 10)
            control.send(data, socket.MSG_DONTWAIT)
        except OSError:
            pass
print("forged")
""",
        statuses=("ok", "error", "unavailable"),
        session=True,
    ),
    Attack(
        "kill or trace the runner",
        "SIGKILL, SIGSTOP and ptrace to all other processes; their memory, descriptors, limits and priorities",
        """
import resource
if len(others()) < 4:  # init, runner, two zygotes
    print("BREACH: where are they?", others())
for pid in others():
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        attempt(f"kill {pid}", lambda: os.kill(pid, number))
    attempt(f"ptrace {pid}", lambda: 1 / (libc.ptrace(16, pid, 0, 0) == 0))
    for name in ("mem", "environ", "maps", "fd/0", "cwd/x", "root/etc/passwd"):
        attempt(f"read {name} of {pid}", lambda: open(f"/proc/{pid}/{name}", "rb").read(1))
    for name in ("oom_score_adj", "coredump_filter", "comm"):
        attempt(f"write {name} of {pid}", lambda: open(f"/proc/{pid}/{name}", "w").write("1"))
    attempt(f"limits of {pid}", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, 1)))
    attempt(f"priority of {pid}", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt(f"scheduler of {pid}", lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)))
    attempt(f"cores of {pid}", lambda: os.sched_setaffinity(pid, {0}))
print("end")
""",
    ),
    Attack(
        "kill everything",
        "SIGKILL to every process that it may signal",
        "os.kill(-1, signal.SIGKILL)\nprint('end')",
    ),
    Attack(
        "signal storm",
        "eight processes that ignore all signals send each signal to everyone until the deadline",
        """
def storm():
    while True:
        for number in range(1, 65):
            for pid in (-1, *others()):
                if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):  # which it can't be deaf to
                    try:
                        os.kill(pid, number)
                    except OSError:
                        pass
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
spawn(storm, 8)
storm()
""",
        statuses=KILLED,
        timeout_s=1.0,
    ),
    Attack(
        "stop the killer",
        "SIGSTOP to everything else under its uid, and so to the process that comes to kill it",
        """
def stop():
    me = os.getpid()
    while True:
        for pid in others():
            try:
                if pid > me:
                    os.kill(pid, signal.SIGSTOP)
            except OSError:
                pass
spawn(stop, 3)
stop()
""",
        statuses=KILLED,
        timeout_s=1.0,
    ),
    Attack(
        "race the killer",
        "forks without end, every child killing its own uid",
        """
def kill():
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except OSError:
            pass
while True:
    try:
        spawn(kill)
    except OSError:
        pass
""",
        statuses=KILLED,
        timeout_s=1.0,
    ),
    Attack(
        "ignore the deadline",
        "catches every signal and every exception",
        """
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
""",
        statuses=("timeout",),
        timeout_s=0.8,
    ),
    Attack(
        "daemon",
        "a grandchild in a session of its own that holds the output and outlives the call",
        """
def daemon():
    os.setsid()
    def forever():
        while True:
            open("/tmp/daemon", "a").close()
            time.sleep(0.01)
    spawn(forever)
spawn(daemon)
time.sleep(0.1)
print("end")
""",
    ),
    Attack(
        "silent end",
        "closes every descriptor and exits without output",
        "os.closerange(0, 4096); os._exit(9)",
        ("error",),
    ),
    Attack("crash", "a segmentation fault", "ctypes.string_at(0)", statuses=("error",)),
    Attack(
        "hostile exception",
        "an exception whose text never ends",
        """
class Evil(Exception):
    def __str__(self):
        while True:
            pass
raise Evil
""",
        statuses=("timeout",),
        timeout_s=0.8,
    ),
    Attack(
        "break Python",
        "removes what the runner's own code needs at the end of a call",
        """
import builtins
os._exit = os.kill = os.write = lambda *a: None
sys.exit = sys.stdout.flush = lambda *a: None
builtins.BaseException = builtins.open = None
for name in [n for n in sys.modules if n.startswith("tool_sandbox")]:
    module = sys.modules[name]
    for key in [k for k in vars(module) if not k.startswith("__")]:
        setattr(module, key, None)
sys.modules.clear()
""",
        statuses=("ok", "error", "timeout"),
        timeout_s=1.0,
    ),
)

RESOURCES = (
    Attack("output flood", "writes without end", "while True: os.write(1, b'x' * 65536)", statuses=("output_limit",)),
    Attack(
        "fork bomb",
        "forks without end until the deadline",
        "while True:\n    try: os.fork()\n    except OSError: pass",
        statuses=("timeout",),
        timeout_s=1.5,
    ),
    Attack(
        "thread bomb",
        "starts threads without end",
        """
import threading
while True:
    try:
        threading.Thread(target=time.sleep, args=(60,)).start()
    except RuntimeError:
        pass
""",
        statuses=("timeout",),
        timeout_s=1.0,
    ),
    Attack(
        "zombie flood",
        "children that end and are never waited for, and orphans",
        """
def orphans():
    spawn(lambda: None, 3)
end = time.monotonic() + 1
while time.monotonic() < end:
    try:
        spawn(orphans)
    except OSError:
        time.sleep(0.01)
print("end")
""",
    ),
    Attack(
        "CPU hog",
        "as many spinning processes as it may have",
        """
def spin():
    while True:
        pass
try:
    spawn(spin, 1000)
except OSError:
    spin()
""",
        statuses=("timeout",),
        timeout_s=2.0,
    ),
    Attack(
        "memory bomb",
        "one process that takes all memory",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        ("memory",),
    ),
    Attack(
        "memory bomb of many",
        "children that together take more than the container has",
        """
def eat():
    x = []
    try:
        while True:
            x.append(bytearray(b"x" * 10**6))
    except MemoryError:
        time.sleep(60)
try:
    spawn(eat, 1000)
except OSError:
    time.sleep(60)
""",
        statuses=KILLED,
        timeout_s=2.0,
    ),
    Attack(
        "memory files and shared memory",
        "memory that no process is charged for: memfd, System V, POSIX shared memory and queues, left behind",
        """
attempt("memfd", lambda: os.memfd_create("leak"))
for name, arguments in (("semget", (77, 1, 0o1666)), ("shmget", (77, 4096, 0o1666)), ("msgget", (77, 0o1666))):
    attempt(name, lambda: 1 / (getattr(libc, name)(*arguments) >= 0))
attempt("mq_open", lambda: 1 / (ctypes.CDLL("librt.so.1").mq_open(b"/leak", 0o102, 0o666, None) >= 0))
total = 0
try:
    for number in range(100):
        with open(f"/dev/shm/leak{number}", "wb") as file:
            total += file.write(bytes(1 << 20))
except OSError:
    pass
if total > 32 << 20:
    print("BREACH", total)
from multiprocessing import shared_memory
os.unlink("/dev/shm/leak0"), os.unlink("/dev/shm/leak1")
shared_memory.SharedMemory("leaked", create=True, size=1 << 20)
print("end", flush=True)
os._exit(0)
""",
    ),
)
