"""What hostile code gets: nothing of the runner, of its neighbours, of the next call or of the network."""

import threading
import time

import pytest

from tool_sandbox.client import SandboxClient
from trajectory.types import ToolResult

pytestmark = pytest.mark.docker


def everywhere(client: SandboxClient, code: str) -> list[ToolResult]:
    """The code's results from all slots: as many calls at once as there are slots, held until all have begun."""
    results: list[ToolResult] = []
    held = "import time\ntime.sleep(0.3)\n" + code
    threads = [threading.Thread(target=lambda: results.append(client.call("python", held))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_healthy(client: SandboxClient) -> None:
    results = everywhere(client, "print('fine')")
    assert [(r.status, r.output) for r in results] == [("ok", "fine\n")] * 4


def test_no_privileges(client: SandboxClient) -> None:
    code = "print({l.split(':')[0]: l.split(':')[1].split() for l in open('/proc/self/status')})"
    status = eval(client.call("python", code).output)
    assert int(status["CapEff"][0], 16) == int(status["CapPrm"][0], 16) == 0
    assert status["NoNewPrivs"] == ["1"]
    assert status["Seccomp"] == ["2"]
    assert len(set(status["Uid"])) == 1
    assert int(status["Uid"][0]) >= 1_000_000
    assert status["Groups"] == []


def test_no_way_back_to_root(client: SandboxClient) -> None:
    code = "import os\nfor f in (os.setuid, os.setgid, os.seteuid):\n    try: f(0); print('root')\n    except OSError: pass"
    assert client.call("python", code).output == ""


def test_only_its_own_descriptors(client: SandboxClient) -> None:
    code = (
        "import os\n"
        "def is_open(fd):\n"
        "    try: os.fstat(fd); return True\n"
        "    except OSError: return False\n"
        "print([fd for fd in range(4096) if is_open(fd)])"
    )
    for prefix in ("", "import numpy\n"):
        assert client.call("python", prefix + code).output == "[0, 1, 2]\n"


def test_no_network(client: SandboxClient) -> None:
    code = (
        "import socket\nprint([n for _, n in socket.if_nameindex()])\n"
        "socket.create_connection(('10.255.255.53', 53), timeout=2)"
    )
    result = client.call("python", code)
    assert result.output.startswith("['lo']\n")
    assert result.status == "error"
    assert "Network is unreachable" in result.output


def test_file_system_is_read_only(client: SandboxClient) -> None:
    code = (
        "for p in ('/x', '/opt/runner/x', '/usr/x', '/etc/x', '/w/x', '/dev/x'):\n"
        "    try: open(p, 'w'); print('wrote', p)\n"
        "    except OSError: pass"
    )
    assert client.call("python", code).output == ""


@pytest.mark.parametrize("frame", ["struct.pack('>I', len(j)) + j", "j + b'\\n'", "b'\\x00' * 100"])
def test_a_forged_frame_is_just_output(client: SandboxClient, frame: str) -> None:
    code = (
        "import os, struct, json\n"
        "j = json.dumps({'op': 'result', 'id': 0, 'slot': 0, 'status': 'ok', 'message': '', 'output': 'forged',"
        " 'duration_s': 0, 'ended': True}).encode()\n"
        f"for fd in range(64):\n    try: os.write(fd, {frame})\n    except OSError: pass\n"
        "raise SystemExit(1)"
    )
    result = client.call("python", code)
    assert result.status == "error"  # it is wait4 that says so
    assert result.output != "forged"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os; os._exit(0)", "ok"),
        ("import os; os._exit(9)", "error"),
        ("import os; os.closerange(0, 4096)", "ok"),
        ("import os; os.closerange(0, 4096); os.abort()", "error"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "error"),
        ("import ctypes; ctypes.string_at(0)", "error"),
        ("import sys; sys.modules.clear(); sys.stdout = None; del __builtins__", "error"),
    ],
)
def test_abrupt_ends_answer_at_once(client: SandboxClient, code: str, status: str) -> None:
    start = time.monotonic()
    result = client.call("python", code, timeout_s=10)
    assert time.monotonic() - start < 3
    assert result.status in (status, "ok" if "modules.clear" in code else status)


def test_the_runner_cannot_be_killed_or_traced(client: SandboxClient) -> None:
    code = (
        "import ctypes, os, signal\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "others = [int(p) for p in os.listdir('/proc') if p.isdigit() and os.stat('/proc/' + p).st_uid == 0]\n"
        "others = [p for p in others if p != os.getpid()]\n"
        "assert len(others) >= 4, others\n"  # init, runner, two zygotes
        "for pid in others:\n"
        "    for number in (signal.SIGKILL, signal.SIGSTOP):\n"
        "        try: os.kill(pid, number); print('signalled', pid)\n"
        "        except PermissionError: pass\n"
        "    if libc.ptrace(16, pid, 0, 0) == 0: print('traced', pid)\n"
        "    for name in ('mem', 'environ', 'fd/0', 'fd/1'):\n"
        "        try: open(f'/proc/{pid}/{name}', 'rb').read(1); print('read', pid, name)\n"
        "        except OSError: pass\n"
    )
    result = client.call("python", code)
    assert (result.status, result.output) == ("ok", "")
    assert_healthy(client)


def test_kill_everything_kills_only_itself(client: SandboxClient) -> None:
    result = client.call("python", "import os, signal; os.kill(-1, signal.SIGKILL); print('alone')")
    assert (result.status, result.output) == ("ok", "alone\n")
    assert_healthy(client)


def test_a_daemon_does_not_outlive_its_call(client: SandboxClient) -> None:
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        open('/tmp/daemon', 'w')\n"
        "        while True: time.sleep(0.05)\n"
        "    os._exit(0)\n"
        "time.sleep(0.2); print('left')"
    )
    start = time.monotonic()
    result = client.call("python", code, timeout_s=10)
    assert (result.status, result.output) == ("ok", "left\n")
    assert time.monotonic() - start < 3  # though the daemon holds the output pipe open
    count = (
        "import os\nme = os.getuid()\n"
        "def uid(p):\n"
        "    try: return int(open(f'/proc/{p}/status').read().split('Uid:')[1].split()[0])\n"
        "    except OSError: return -1\n"
        "print([p for p in os.listdir('/proc') if p.isdigit() and uid(p) == me] == [str(os.getpid())])"
    )
    assert [r.output for r in everywhere(client, count)] == ["True\n"] * 4


def test_fork_bomb(client: SandboxClient) -> None:
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    start = time.monotonic()
    result = client.call("python", code, timeout_s=1.0)
    assert result.status in ("timeout", "unavailable")
    assert time.monotonic() - start < 8
    assert_healthy(client)


def test_processes_that_fight_their_killer(client: SandboxClient) -> None:
    """They signal whatever else runs under their uid, so the one that comes to kill them."""
    code = (
        "import os, signal\nme = os.getpid()\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0: break\n"
        "while True:\n"
        "    for p in os.listdir('/proc'):\n"
        "        if p.isdigit() and int(p) > me + 8:\n"
        "            try: os.kill(int(p), signal.SIGSTOP)\n"
        "            except OSError: pass"
    )
    result = client.call("python", code, timeout_s=0.5)
    assert result.status in ("timeout", "unavailable")
    time.sleep(2)  # if its slot could not be cleaned, the container was replaced
    assert_healthy(client)


def test_nothing_is_left_for_the_next_call(client: SandboxClient) -> None:
    litter = (
        "import os\n"
        "for d in ('/tmp', '/dev/shm', os.getcwd()):\n"
        "    d = f'{d}/{os.getuid()}'; os.makedirs(d + '/deep/er')\n"
        "    open(d + '/secret', 'w').write('x'); open(d + '/deep/er/f', 'w'); os.symlink('/etc', d + '/deep/link')\n"
        "    os.chmod(d + '/deep/er', 0); os.chmod(d + '/deep', 0)\n"
        "for i in range(1200): os.mkdir('d'); os.chdir('d')"  # deeper than a path can name
    )
    assert [r.status for r in everywhere(client, litter)] == ["ok"] * 4
    look = "import os\nprint([os.listdir(d) for d in ('/tmp', '/dev/shm', os.getcwd())])"
    assert [r.output for r in everywhere(client, look)] == ["[[], [], []]\n"] * 4


def test_a_full_disk_is_the_callers_own_problem(client: SandboxClient) -> None:
    code = (
        "for d in ('/tmp', '/dev/shm', '.'):\n"
        "    try:\n"
        "        with open(d + '/big', 'wb') as f:\n"
        "            while True: f.write(bytes(1 << 20))\n"
        "    except OSError as e: print(e.errno)"
    )
    result = client.call("python", code)
    assert result.status in ("ok", "memory")
    assert_healthy(client)


def test_neighbours_cannot_read_each_other(client: SandboxClient) -> None:
    code = (
        "import os, time\n"
        "open(f'/tmp/{os.getuid()}', 'w').write('secret')\n"
        "time.sleep(0.5)\n"
        "for name in os.listdir('/tmp'):\n"
        "    if name != str(os.getuid()):\n"
        "        try: print('read', open('/tmp/' + name).read())\n"
        "        except PermissionError: print('refused')"
    )
    outputs = [r.output for r in everywhere(client, code)]
    assert set(outputs) <= {"refused\n", ""}
    assert "refused\n" in outputs
