"""Attacks for more rights: become root, leave the container, reach the network. attack.py says how to read them."""

from __future__ import annotations

from tool_sandbox.attacks.attack import Attack
from tool_sandbox.image.syscalls import DENIED, MACHINES

ESCALATION = (
    Attack(
        "become root",
        "setuid, capset, a better priority, a smaller OOM score, higher limits, device nodes, chroot",
        """
import resource
for name in ("setuid", "setgid", "seteuid", "setegid"):
    attempt(name, lambda: getattr(os, name)(0))
attempt("setgroups", lambda: os.setgroups([0]))
attempt("nice", lambda: os.nice(-1))
attempt("realtime", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
attempt("oom score", lambda: open("/proc/self/oom_score_adj", "w").write("-1000") and open("/proc/self/x"))
attempt("nproc", lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1 << 20, 1 << 20)))
attempt("memory", lambda: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2))
attempt("mknod", lambda: os.mknod("/tmp/null", 0o20666, os.makedev(1, 3)))
attempt("chroot", lambda: os.chroot("/tmp"))
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
if any(int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")) or status["Groups"].strip():
    print("BREACH", status)
if (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) != ("1", "2"):
    print("BREACH", status)
if len(set(status["Uid"].split() + status["Gid"].split())) != 1 or os.getuid() < 2_000:
    print("BREACH", status["Uid"])
print("end")
""",
    ),
    Attack(
        "namespaces",
        "unshare, clone and setns to new user, mount, network and pid namespaces; mounts",
        """
NEW = {"user": 0x10000000, "mount": 0x20000, "net": 0x40000000, "pid": 0x20000000, "ipc": 0x8000000, "cgroup": 0x2000000}
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
def ok(result):
    if result == 0:
        print("BREACH inside"); os._exit(1)
    if result < 0:
        raise OSError(ctypes.get_errno())
    return result
for name, flag in NEW.items():
    attempt("unshare " + name, lambda: ok(libc.unshare(flag) or 1))
    attempt("clone " + name, lambda: ok(libc.syscall(clone, flag | signal.SIGCHLD, 0, 0, 0, 0)))
    attempt("setns " + name, lambda: ok(libc.setns(os.open("/proc/1/ns/" + name.replace("mount", "mnt"), 0), 0) or 1))
attempt("mount", lambda: ok(libc.mount(b"x", b"/tmp", b"tmpfs", 0, 0) or 1))
attempt("umount", lambda: ok(libc.umount2(b"/tmp", 2) or 1))
print("end")
""",
    ),
    Attack(
        "kernel interfaces",
        "io_uring, bpf, perf, userfaultfd, keys, tracing, memory files: any answer but 'not there'",
        f"""
column = {MACHINES!r}[os.uname().machine][0]
for name, numbers in {DENIED!r}.items():
    ctypes.set_errno(0)
    result = libc.syscall(numbers[column], 0, 0, 0, 0, 0, 0)
    if result >= 0 or ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
        print("BREACH", name, result, errno.errorcode.get(ctypes.get_errno()))
print("end")
""",
    ),
    Attack(
        "proc and sys",
        "write to anything under /proc/sys and /sys; read the kernel's memory, log and keys; open devices",
        """
count = 0
for top in ("/proc/sys", "/sys"):
    for folder, folders, files in os.walk(top):
        for name in files:
            count += 1
            path = os.path.join(folder, name)
            if count < 20000 and os.access(path, os.W_OK):
                attempt("write " + path, lambda: os.open(path, os.O_WRONLY))
        attempt("mkdir in " + folder, lambda: os.mkdir(folder + "/x"))
for path in ("/proc/sysrq-trigger", "/proc/irq/default_smp_affinity"):
    attempt("write " + path, lambda: os.open(path, os.O_WRONLY))
for path in ("/proc/kcore", "/proc/kmsg", "/proc/keys", "/proc/kallsyms", "/proc/timer_list", "/dev/mem", "/dev/kvm"):
    attempt("read " + path, lambda: [line for line in open(path, "rb") if line.strip(b"0\\n ") and int(line[:16], 16)][0])
attempt("dmesg", lambda: 1 / (libc.klogctl(3, ctypes.create_string_buffer(99), 99) > 0))
known = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console", "core"}
for name in set(os.listdir("/dev")) - known:
    if not os.path.isdir("/dev/" + name):
        attempt("device " + name, lambda: os.open("/dev/" + name, os.O_RDONLY) > 2 or 1 / 0)
print("end")
""".replace('"core"}', '"core", "fd", "stdin", "stdout", "stderr"}'),
        timeout_s=30.0,
    ),
    Attack(
        "clock",
        "set the machine's time",
        """
attempt("clock_settime", lambda: time.clock_settime(time.CLOCK_REALTIME, 0))
attempt("settimeofday", lambda: 1 / (libc.settimeofday(ctypes.create_string_buffer(16), None) == 0))
adjustment = ctypes.create_string_buffer(256)
adjustment[0] = 1  # ADJ_OFFSET
attempt("adjtimex", lambda: 1 / (libc.adjtimex(adjustment) >= 0))
print("end")
""",
    ),
    Attack(
        "network",
        "every kind of socket, to the outside, the host, the hypervisor and the neighbours; abstract names",
        """
import socket
for name in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG"):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        attempt(f"{name} {kind}", lambda: socket.socket(getattr(socket, name), kind))
        attempt(f"pair of {name} {kind}", lambda: socket.socketpair(getattr(socket, name), kind))
attempt("terminal", lambda: os.open("/dev/ptmx", os.O_RDWR))
attempt("loopback", lambda: socket.create_server(("127.0.0.1", 0)))
attempt("outside", lambda: socket.create_connection(("192.0.2.1", 53), timeout=1))
a, b = socket.socketpair()  # which Python's own parts need
a.send(b"x")
print("end" if b.recv(1) == b"x" else "no socketpair")
""",
    ),
)
