"""What hostile code tries, and what becomes of it. Each attack here succeeds against a plain design."""

import threading
import time

import pytest

from tool_sandbox.client import SandboxClient
from trajectory.types import ToolResult

pytestmark = pytest.mark.docker


def run(client: SandboxClient, code: str, **settings: float) -> str:
    result = client.call("python", code, **settings)
    assert result.status == "ok", result
    return result.output.strip()


def test_user_code_has_no_capability_and_cannot_gain_one(strict: SandboxClient) -> None:
    fields = dict(line.split(":\t", 1) for line in run(strict, "print(open('/proc/self/status').read())").splitlines())
    assert {int(fields[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")} == {0}
    assert fields["Seccomp"] == "2"
    assert fields["NoNewPrivs"] == "1"
    uids = [int(uid) for uid in (fields["Uid"] + "\t" + fields["Gid"]).split()]
    assert len(set(uids)) == 1  # real, effective, saved and file-system ids: none is left to go back to
    assert uids[0] >= 1_000_000
    assert fields["Groups"].strip() == ""


def test_calls_that_run_at_once_have_uids_of_their_own(roomy: SandboxClient) -> None:
    outputs: list[str] = []
    code = "import os, time; time.sleep(1); print(os.getuid())"
    threads = [threading.Thread(target=lambda: outputs.append(run(roomy, code))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(outputs)) == 4


def test_a_forged_reply_is_output(strict: SandboxClient) -> None:
    """Every descriptor that can be had, written full of what the runner and the zygote would say."""
    code = """
import json, os, struct, sys
frame = json.dumps({"op": "result", "id": 0, "slot": 0, "status": "ok", "message": "forged", "output": "forged",
                    "duration_s": 0.0, "ended": True}).encode()
order = b'{"op": "run", "slot": 0, "status": 0}'
for fd in range(1, 256):
    for data in (struct.pack(">I", len(frame)) + frame, order):
        try:
            os.write(fd, data)
        except OSError:
            pass
for pid in os.listdir("/proc"):
    for fd in (0, 1, 2, 3, 4, 5):
        if pid.isdigit() and int(pid) != os.getpid():
            try:
                os.write(os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY), frame)
                print("WROTE TO", pid)
            except OSError:
                pass
sys.exit(7)
"""
    result = strict.call("python", code)
    assert (result.status, result.message) == ("error", "exit code 7")
    assert "forged" in result.output  # as data
    assert "WROTE TO" not in result.output
    assert run(strict, "print('alive')") == "alive"


def test_code_holds_only_its_own_descriptors(strict: SandboxClient) -> None:
    code = """
import os
for fd in range(64):
    try:
        print(fd, os.readlink(f"/proc/self/fd/{fd}").split(":")[0])
    except OSError:
        pass
"""
    assert run(strict, code) == "0 /dev/null\n1 pipe\n2 pipe"


def test_runner_and_zygotes_cannot_be_killed_stopped_traced_or_read(strict: SandboxClient) -> None:
    code = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
done = []
def attempt(what, action):
    try:
        action()
        done.append(what)
    except OSError:
        pass
def attach(pid):
    if libc.ptrace(16, pid, 0, 0) != 0:  # PTRACE_ATTACH
        raise OSError
others = [int(p) for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()]
for pid in others:
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        attempt(f"kill {pid}", lambda: os.kill(pid, number))
    attempt(f"ptrace {pid}", lambda: attach(pid))
    for name in ("mem", "environ", "fd/0", "cwd/x"):
        attempt(f"read {pid} {name}", lambda: open(f"/proc/{pid}/{name}", "rb").close())
    attempt(f"oom {pid}", lambda: open(f"/proc/{pid}/oom_score_adj", "w").write("1000"))
attempt("oom_score_adj", lambda: open("/proc/self/oom_score_adj", "w").write("-1000"))
attempt("setuid", lambda: os.setuid(0))
attempt("write", lambda: open("/opt/runner/tool_sandbox/image/runner.py", "a").close())
attempt("write", lambda: open("/opt/site-packages/x.py", "a").close())
attempt("mknod", lambda: os.mknod("/tmp/null", 0o20666, os.makedev(1, 3)))
attempt("unshare", lambda: (_ for _ in ()).throw(OSError) if libc.unshare(0x10000000) else None)
print(len(others) >= 4, done)
"""
    before = run(strict, "import os; print(os.getuid())")
    assert run(strict, code) == "True []"
    assert run(strict, "import os; print(os.getuid())") == before  # the same container still


def test_there_is_no_network(strict: SandboxClient) -> None:
    code = """
import os, socket
print(os.listdir("/sys/class/net"))
for family, address in ((socket.AF_INET, ("192.0.2.1", 53)), (socket.AF_INET, ("172.17.0.1", 22))):
    try:
        s = socket.socket(family); s.settimeout(1)
        s.connect(address); print("CONNECTED")
    except OSError as error:
        print(error.strerror)
"""
    assert run(strict, code) == "['lo']\nNetwork is unreachable\nNetwork is unreachable"


def test_the_environment_tells_nothing(strict: SandboxClient) -> None:
    names = set(eval(run(strict, "import os; print(sorted(os.environ))")))
    assert names <= {
        *(
            "HOME",
            "LANG",
            "LC_CTYPE",
            "LOGNAME",
            "MALLOC_ARENA_MAX",
            "OMP_NUM_THREADS",
            "OPENBLAS_NUM_THREADS",
            "PATH",
            "PWD",
        ),
        *("PYTHONDONTWRITEBYTECODE", "PYTHONINTMAXSTRDIGITS", "PYTHONPATH", "TMPDIR", "USER"),
        *("LOKY_MAX_CPU_COUNT", "MPLBACKEND", "TQDM_MININTERVAL"),
    }


def test_a_daemon_is_dead_before_the_next_call(strict: SandboxClient) -> None:
    code = """
import os, time
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(w, str(os.getpid()).encode())
        while True:
            print("noise", flush=True)
            time.sleep(0.01)
    os._exit(0)
pid = os.read(r, 20).decode()
os.write(1, f"daemon {pid}\\n".encode())
os._exit(0)
"""
    output = run(strict, code)
    pid = next(line.split()[1] for line in output.splitlines() if line.startswith("daemon"))
    code = """
import os
alive = []
for pid in os.listdir("/proc"):
    if pid.isdigit():
        try:
            status = open(f"/proc/{pid}/status").read()
        except OSError:
            continue
        if f"Uid:\\t{os.getuid()}" in status and "State:\\tZ" not in status:
            alive.append(int(pid))
print(alive == [os.getpid()])
"""
    assert pid.isdigit()
    assert run(strict, code) == "True"
    assert "noise" not in run(strict, "import time; time.sleep(0.2)")


def test_nothing_of_a_call_is_there_for_the_next(strict: SandboxClient) -> None:
    """Files wherever one can write, behind closed and bottomless directories; modules that would be imported."""
    code = """
import os
for top in ("/tmp", "/dev/shm", os.getcwd()):
    os.makedirs(f"{top}/closed/inner"); open(f"{top}/closed/inner/secret", "w").write("secret")
    os.chmod(f"{top}/closed/inner", 0); os.chmod(f"{top}/closed", 0)
    open(f"{top}/math2.py", "w").write("secret")
    os.symlink("/etc/passwd", f"{top}/link"); os.mkfifo(f"{top}/fifo")
    os.makedirs(f"{top}/deep"); os.chdir(f"{top}/deep")
    for _ in range(1200):
        os.mkdir("d"); os.chdir("d")
    os.chdir("/")
for place in ("/etc/x", "/opt/x", "/run/x", "/var/tmp/x", "/dev/x", "/w/x", "/x"):
    try:
        open(place, "w"); print("WROTE", place)
    except OSError:
        pass
print(os.getuid())
"""
    uid = run(strict, code)
    code = """
import os
print(os.getuid())
print([sorted(os.listdir(top)) for top in ("/tmp", "/dev/shm", os.getcwd())], oct(os.stat(os.getcwd()).st_mode))
"""
    assert (
        run(strict, code, timeout_s=10) == f"{uid}\n[[], [], ['main.py']] 0o40770"
    )  # and the container didn't have to go


def test_no_system_v_object_outlives_a_call(strict: SandboxClient) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None)
print(libc.semget(77, 1, 0o1666), libc.shmget(77, 4096, 0o1666), libc.msgget(77, 0o1666))
"""
    assert run(strict, code) == "-1 -1 -1"


def test_what_a_call_changes_in_python_is_its_own(strict: SandboxClient) -> None:
    run(strict, "import os, math, builtins\nmath.pi = 3\nbuiltins.print2 = print\nos._exit = lambda code: None")
    assert (
        run(strict, "import math, builtins; print(math.pi, hasattr(builtins, 'print2'))") == "3.141592653589793 False"
    )
    warm = "import sympy; print(sympy.sqrt(4)); sympy.sqrt = None"
    assert run(strict, warm) == run(strict, warm) == "2"


def test_a_fork_bomb_stays_in_its_slot_and_ends_with_its_call(roomy: SandboxClient) -> None:
    bomb = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
    results: list[ToolResult] = []
    thread = threading.Thread(target=lambda: results.append(roomy.call("python", bomb, timeout_s=1.5)))
    thread.start()
    time.sleep(0.3)
    code = "import os, time; time.sleep(0.3); os.fork() or os._exit(0); print('alive')"
    neighbours: list[ToolResult] = []
    threads = [threading.Thread(target=lambda: neighbours.append(roomy.call("python", code))) for _ in range(3)]
    for neighbour in threads:  # three of them: one shares the bomb's container
        neighbour.start()
    for neighbour in [*threads, thread]:
        neighbour.join(30)
    assert [result.output for result in neighbours] == ["alive\n"] * 3
    assert results[0].status == "timeout"
    assert results[0].duration_s < 20.0


def test_code_that_kills_its_own_uid_without_end_cannot_save_itself(strict: SandboxClient) -> None:
    """It races with whoever comes to kill it under the same uid."""
    code = """
import os, signal
while True:
    if os.fork() == 0:
        while True:
            try:
                os.kill(-1, signal.SIGKILL)
            except OSError:
                pass
"""
    uid = run(strict, "import os; print(os.getuid())")
    result = strict.call("python", code, timeout_s=1.0)
    assert result.status in ("timeout", "error")
    assert run(strict, "import os; print(os.getuid())") == uid


def test_when_children_eat_all_memory_the_container_lives_on(roomy: SandboxClient) -> None:
    """One process has a limit of its own; many together meet the container's, and the kernel picks among them."""
    code = """
import os, time
for _ in range(12):
    if os.fork() == 0:
        data = bytearray(200 << 20)
        for i in range(0, len(data), 4096):
            data[i] = 1
        time.sleep(5)
        os._exit(0)
deaths = 0
while True:
    try:
        deaths += os.wait()[1] == 9
    except ChildProcessError:
        break
    if deaths >= 3:
        break
print("killed", deaths)
"""
    result = roomy.call("python", code, timeout_s=10)
    assert result.status == "memory" or result.output == "killed 3\n", result
    if result.status == "memory":
        end = ("The kernel killed it, as its container was out of memory.", "its container had little left.")
        assert result.message.endswith(end)
    for _ in range(4):
        assert run(roomy, "print('alive')") == "alive"


def test_a_full_tmp_and_home_harm_nobody(strict: SandboxClient) -> None:
    code = """
import os
for top in ("/tmp", "/dev/shm", os.getcwd()):
    try:
        with open(f"{top}/big", "wb") as file:
            while True:
                file.write(bytes(1 << 20))
    except OSError as error:
        print(error.strerror)
"""
    assert run(strict, code, timeout_s=10).splitlines()[:2] == ["No space left on device"] * 2
    assert run(strict, "open('x', 'w').write('y'); print('alive')") == "alive"
