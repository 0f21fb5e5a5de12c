"""A head with Ray's real autoscaler and dashboard, whose nodes are processes here: cluster/fake.yaml on free ports.

Not Ray's own AutoscalingCluster: it begins with `ray stop --force`, which ends every Ray on the machine, and reads a file
that the wheel hasn't got.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
HOST = "127.0.0.1"


@dataclass(frozen=True)
class FakeCluster:
    dashboard: str  # http://host:port
    token: str
    folder: Path

    @property
    def client_environment(self) -> dict[str, str]:
        """What a client needs, over an environment that may know another Ray."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def fake_cluster() -> Iterator[FakeCluster]:
    # Short, as sockets' paths are limited to 107 characters; unique, as it is how its processes are known.
    folder = Path(tempfile.mkdtemp(prefix="atj-", dir="/tmp"))
    port, dashboard_port, token = free_port(), free_port(), secrets.token_hex(16)
    config = yaml.safe_load((ROOT / "cluster/fake.yaml").read_text())
    config["provider"]["gcs_address"] = f"{HOST}:{port}"
    config["idle_timeout_minutes"] = 0.1
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    cluster = FakeCluster(f"http://{HOST}:{dashboard_port}", token, folder)
    env = cluster.client_environment | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOTRAJ_CLUSTER_FILE": str(file),
        "AUTOTRAJ_FAKE_NODES": str(folder),
        # The head's PATH decides which `python` a job's entry point runs.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
    command += [f"--node-ip-address={HOST}", f"--port={port}", f"--dashboard-port={dashboard_port}"]
    command += [f"--temp-dir={folder}", f"--autoscaling-config={file}", "--object-store-memory=100000000"]
    # The agent, which starts jobs, gives up without a word where another Ray has its fixed default port.
    command += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_ready(cluster, head)
        yield cluster
    finally:
        _end(head, folder)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def end_now(cluster: FakeCluster) -> None:
    """As a power cut would."""
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _names(process, cluster.folder):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _wait_ready(cluster: FakeCluster, head: "subprocess.Popen[bytes]") -> None:
    request = urllib.request.Request(
        f"{cluster.dashboard}/api/version", headers={"Authorization": f"Bearer {cluster.token}"}
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            assert answer.status == 200
            return
        said = (cluster.folder / "head.log").read_text()[-3000:]
        assert head.poll() is None, f"the head ended: {said}"
        assert time.monotonic() < deadline, f"no dashboard after {START_TIMEOUT_S:.0f} s: {said}"
        time.sleep(0.25)


def _end(head: "subprocess.Popen[bytes]", folder: Path) -> None:
    """SIGTERM to the head, then SIGKILL to whatever of this cluster is left, known by its folder."""
    head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(10)
    for _ in range(20):
        left = [p for p in psutil.process_iter() if p.pid != os.getpid() and _names(p, folder)]
        if not left:
            break
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)
    if head.poll() is None:
        head.kill()
    head.wait(10)


def _names(process: psutil.Process, folder: Path) -> bool:
    """On its command line or, as of jobs and workers, in its environment."""
    try:
        return any(str(folder) in part for part in [*process.cmdline(), *process.environ().values()])
    except psutil.Error:
        return False
