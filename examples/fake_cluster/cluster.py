"""The cluster of `cluster/fake.yaml` on this machine. Tests and benchmarks use it, too.

It has a head with Ray's own autoscaler, dashboard and job server, on free ports and with its own token; nodes are processes
(`nodes.py`). Ray's AutoscalingCluster (2.60) isn't used: it begins with `ray stop --force`, which ends every Ray on the
machine, and reads a file that isn't in the wheel.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
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

from cluster.session import CLUSTER_FILE_VARIABLE
from examples.fake_cluster.nodes import AGENT_PORTS, FOLDER_VARIABLE, OBJECT_STORE_BYTES, STARTED, free_port

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
START_TIMEOUT_S = 180.0
END_TIMEOUT_S = 20.0
SILENT_NODE_S = 300
"""The autoscaler gives up a silent node after this. A busy machine may not start one within the default, 30 s."""


@dataclass(frozen=True, slots=True)
class FakeCluster:
    """A running cluster."""

    dashboard: str
    """`http://host:port`, for `submit --address`."""
    address: str
    """`host:port` of the head, for RAY_ADDRESS."""
    token: str
    folder: Path
    head: subprocess.Popen[bytes]

    @property
    def client_environment(self) -> dict[str, str]:
        """The environment that a client needs, without variables for another Ray."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def nodes(self, node_type: str) -> list[str]:
        """The ids of the nodes of a type whose processes run, oldest first."""
        found = {
            environment["RAY_CLOUD_INSTANCE_ID"]
            for _, environment in self._processes()
            if environment.get("RAY_NODE_TYPE_NAME") == node_type
        }
        return sorted(found)

    def kill_node(self, node_id: str) -> None:
        """Simulates a power cut of a node: SIGKILL to all its processes at once."""
        for process, environment in self._processes():
            if environment.get("RAY_CLOUD_INSTANCE_ID") == node_id:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def find(self, name: str) -> list[psutil.Process]:
        """The cluster's processes whose command line contains `name`, such as `ray::Learner`."""
        found = []
        for process, _ in self._processes():
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def _processes(self) -> list[tuple[psutil.Process, dict[str, str]]]:
        """All processes that the cluster has started. They inherit a variable by which they are found."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get(FOLDER_VARIABLE) == str(self.folder) and process.pid != os.getpid():
                    found.append((process, environment))
        return found

    def _end(self) -> None:
        """SIGTERM to the head, which ends its nodes, then SIGKILL to whatever is left."""
        with contextlib.suppress(ProcessLookupError):
            self.head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.head.wait(END_TIMEOUT_S)
        deadline = time.monotonic() + END_TIMEOUT_S
        while (left := [process for process, _ in self._processes()]) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
        self.head.wait(END_TIMEOUT_S)


@contextlib.contextmanager
def fake_cluster(*, idle_timeout_minutes: float = 1.0) -> Iterator[FakeCluster]:
    """Runs a cluster during the block. If it doesn't come up, raises TimeoutError or RuntimeError with the head's output."""
    # Short, as the paths of sockets in it are limited to 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="atj-", dir="/tmp"))
    port, dashboard_port, token = free_port(), free_port(), secrets.token_hex(16)
    config = yaml.safe_load((ROOT / "cluster/fake.yaml").read_text())
    config["provider"]["gcs_address"] = f"{HOST}:{port}"
    config["idle_timeout_minutes"] = idle_timeout_minutes
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_HEARTBEAT_TIMEOUT_S": str(SILENT_NODE_S),
        CLUSTER_FILE_VARIABLE: str(file),
        FOLDER_VARIABLE: str(folder),
        # The autoscaler finds its provider here. The head's PATH decides which `python` a job's entry point runs.
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
    command += [f"--node-ip-address={HOST}", f"--port={port}", f"--dashboard-port={dashboard_port}"]
    command += [f"--temp-dir={folder}", f"--autoscaling-config={file}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    # The agent, which starts jobs, ends without a message if another Ray uses its fixed default port.
    command += [f"--{name}={free_port()}" for name in ("ray-client-server-port", *AGENT_PORTS)]
    command += ["--disable-usage-stats"]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    cluster = FakeCluster(f"http://{HOST}:{dashboard_port}", f"{HOST}:{port}", token, folder, head)
    try:
        _wait_ready(cluster)
        yield cluster
    finally:
        cluster._end()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(cluster: FakeCluster) -> None:
    request = urllib.request.Request(
        f"{cluster.dashboard}/api/version", headers={"Authorization": f"Bearer {cluster.token}"}
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        said = (cluster.folder / "head.log").read_text()[-3000:]
        if STARTED.decode() in said:  # the dashboard answers before the rest is up
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
                return
        if cluster.head.poll() is not None:
            raise RuntimeError(f"the head ended: {said}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {START_TIMEOUT_S:.0f} s on the head's dashboard: {said}")
        time.sleep(0.25)
