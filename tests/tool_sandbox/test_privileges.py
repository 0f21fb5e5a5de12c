"""What the gateway process is when it serves: read from /proc, and tried from a process that has become the same."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from certificates import Authority

from tool_sandbox import privileges
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import ROOT, LocalGateway
from tool_sandbox.search.index import build_index

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
ENGINE = "/var/run/docker.sock"


def status_of(pid: int) -> dict[int, dict[str, str]]:
    """/proc's word on each thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        found[int(task.name)] = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return found


@pytest.mark.docker
@as_root
def test_the_gateway_is_nobody_without_groups_and_capabilities(roomy_gateway: LocalGateway) -> None:
    threads = status_of(roomy_gateway.pid)
    assert len(threads) > 1
    for status in threads.values():
        assert set(status["Uid"].split() + status["Gid"].split()) == {str(privileges.NOBODY)}
        assert status["Groups"] == ""
        assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")} == {0}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def dropped(code: str) -> list[str]:
    """What `code` prints in a process that gave up what the gateway does, after a thread of it had started."""
    script = f"""
import os, socket, subprocess, threading
from tool_sandbox import privileges
started, go = threading.Event(), threading.Event()
def attempt(name, action):
    try:
        print(name, "worked:", action(), flush=True)
    except OSError as error:
        print(name, type(error).__name__, flush=True)
def all_attempts():
{code}
def older():
    started.set()
    go.wait(20)
    all_attempts()
thread = threading.Thread(target=older)
thread.start()
started.wait(20)
privileges.drop()
all_attempts()
go.set()
thread.join(20)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.docker
def test_who_takes_over_the_gateway_can_not_reach_the_engine_nor_run_a_program() -> None:
    """Also in a thread that ran before."""
    code = f"""
    attempt("connect", lambda: socket.socket(socket.AF_UNIX).connect({ENGINE!r}))
    attempt("docker", lambda: subprocess.run(["docker", "version"], stdout=subprocess.DEVNULL).returncode)
    attempt("sh", lambda: os.execv("/bin/sh", ["sh", "-c", "true"]))
    attempt("pair", lambda: len(socket.socketpair()))
    attempt("tcp", lambda: socket.socket().fileno() > 0)
"""
    refused = ["connect PermissionError", "docker PermissionError", "sh PermissionError"]
    assert dropped(code) == [*refused, "pair worked: 2", "tcp worked: True"] * 2
    socket.socket(socket.AF_UNIX).connect(ENGINE)  # without the drop it works


@pytest.mark.docker
@as_root
def test_without_the_filter_the_user_alone_is_kept_from_the_engine_too() -> None:
    """The two don't lean on each other."""
    code = f"""
import os, socket
os.setgroups([])
os.setresgid(*[{privileges.NOBODY}] * 3)
os.setresuid(*[{privileges.NOBODY}] * 3)
try:
    socket.socket(socket.AF_UNIX).connect({ENGINE!r})
except PermissionError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.docker
@as_root
def test_without_root_the_filter_alone_keeps_a_user_of_the_engines_group_from_it() -> None:
    """Who isn't root keeps its groups; with them it reaches the engine, until the drop."""
    script = f"""
import os, socket
from tool_sandbox import privileges
os.setgroups([os.stat({ENGINE!r}).st_gid])
os.setresgid(12345, 12345, 12345)
os.setresuid(12345, 12345, 12345)
def connect():
    try:
        socket.socket(socket.AF_UNIX).connect({ENGINE!r})
        return "connected"
    except PermissionError:
        return "refused"
print(connect(), privileges.drop(), connect())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "connected False refused\n", done.stderr


@pytest.mark.docker
@as_root
def test_all_that_only_root_can_read_is_read_before(tmp_path: Path) -> None:
    """Certificates, a search index and a checkout that nobody else may open: the gateway serves all of it, and once it is
    `nobody` it opens no file of ours, so that no lazy import waits to fail."""
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "a", "contents": "stamps of Leo"}))
    build_index(tmp_path / "corpus.jsonl", tmp_path / "index")
    authority = Authority(tmp_path, "ours")
    tls = authority.issue("gateway", "localhost")
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    config = SandboxConfig.model_validate(
        {"address": "localhost:0", "metrics_address": "localhost:0", "tls": tls, "num_containers": 1, "num_spares": 0}
        | {"search": {"kind": "bm25", "index": str(tmp_path / "index")}, "start_timeout_s": 120}
    )
    script = f"""
import os, sys
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and os.getuid() == {privileges.NOBODY}:
        os.write(2, ("OPENED " + arguments[0] + "\\n").encode())
sys.addaudithook(hook)
from tool_sandbox import server
sys.exit(server.main())
"""
    command = [sys.executable, "-c", script, str(os.getpid())]
    pipe = subprocess.PIPE
    gateway = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        assert gateway.stdin is not None
        assert gateway.stdout is not None
        gateway.stdin.write(config.model_dump_json())
        gateway.stdin.close()
        gateway.stdin = None
        ready = json.loads(gateway.stdout.readline())
        assert "error" not in ready
        with SandboxClient(ready["address"], tls=tls) as client:
            assert client.call("python", "print(1)", timeout_s=20).output == "1\n"
            assert client.call("python", "1 / 0", timeout_s=20).status == "error"
            assert client.call("python", "while True: pass", timeout_s=0.5).status == "timeout"
            assert client.call("python", "x = 1", timeout_s=20, session_id="s").fresh
            assert client.call("search", "stamps", timeout_s=20).status == "ok"
            assert client.call("unknown", "", timeout_s=20).status == "rejected"
            assert client.stats().pool.containers["serving"] == 1
        context = ssl.create_default_context(cafile=tls.ca)
        context.load_cert_chain(tls.cert, tls.key)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        with urllib.request.urlopen(
            f"https://{ready['metrics_address']}/metrics", timeout=20, context=context
        ) as reply:
            assert b"autotraj_sandbox_queue_length" in reply.read()
        gateway.send_signal(signal.SIGTERM)
        _, errors = gateway.communicate(timeout=60)
    finally:
        gateway.kill()
        gateway.communicate(timeout=20)
    assert gateway.returncode == 0, errors
    opened = [line.split(" ", 1)[1] for line in errors.splitlines() if line.startswith("OPENED ")]
    ours = (str(ROOT), sys.prefix, str(Path(sys.prefix).resolve()), str(tmp_path))
    assert [path for path in opened if path.startswith(ours)] == []
