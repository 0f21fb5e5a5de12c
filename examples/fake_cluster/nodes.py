"""Nodes that are processes of this machine, for Ray's real autoscaler: the provider of `fake.yaml`.

    autoscaler ──create──▶ `ray start --address=HEAD --block`, a process group of its own ──▶ raylet, agents, workers
        ▲                                                                                         │
        └──── gone, as a cloud reports a machine that was taken away ◀── its process ended ───────┘

Ray's `fake_multinode` (2.60) keeps all nodes in one folder. A node that joins a running job unpacks the job's working
directory there again, while other processes use it, and the driver's relative paths become invalid. Here every node has its
own folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray._private.services
from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import NODE_KIND_WORKER, STATUS_UP_TO_DATE
from ray.autoscaler.tags import TAG_RAY_NODE_KIND as KIND
from ray.autoscaler.tags import TAG_RAY_NODE_NAME as NAME
from ray.autoscaler.tags import TAG_RAY_NODE_STATUS as STATUS

FOLDER_VARIABLE = "AUTOTRAJ_FAKE_NODES"
"""The nodes' folders are made here. It is short, as the paths of sockets in them are limited to 107 characters."""
AGENT_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
)
START_TIMEOUT_S = 60
STARTED = b"Ray runtime started."
WORKING_NICENESS = 10
"""The weight of the session of a node that is up, against one that starts."""
END_TIMEOUT_S = 10.0
OBJECT_STORE_BYTES = 150_000_000


class FakeNodes(FakeMultiNodeProvider):
    """`provider: {type: external, module: examples.fake_cluster.nodes.FakeNodes}`. The head must be started with
    RAY_FAKE_CLUSTER=1."""

    def _create_node_with_resources_and_labels(
        self,
        node_config: Mapping[str, Any],
        tags: Mapping[str, str],
        count: int,
        resources: Mapping[str, float],
        labels: Mapping[str, str],
    ) -> None:
        with self.lock:
            node_id = self._next_hex_node_id()
            self._nodes[node_id] = {
                "tags": {KIND: NODE_KIND_WORKER, NAME: node_id, STATUS: STATUS_UP_TO_DATE, **tags},
                "node": self._start(node_id, tags["ray-user-node-type"], dict(resources), labels),
            }

    def _start(
        self, node_id: str, node_type: str, resources: dict[str, float], labels: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        folder = Path(os.environ.get(FOLDER_VARIABLE, "/tmp/ray-nodes"), f"{node_type[0]}{int(node_id[-5:])}")
        folder.mkdir(parents=True, exist_ok=True)
        address = self._gcs_address or f"{ray._private.services.get_node_ip_address()}:6379"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}"]
        command += [f"--node-ip-address={address.rpartition(':')[0]}", f"--temp-dir={folder}"]
        command += [f"--num-cpus={resources.pop('CPU', 0):g}", f"--num-gpus={resources.pop('GPU', 0):g}"]
        command += [
            f"--resources={json.dumps(resources)}",
            f"--labels={','.join(f'{k}={v}' for k, v in labels.items())}",
        ]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--{name}={free_port()}" for name in AGENT_PORTS] + ["--disable-usage-stats"]
        # By these labels the autoscaler recognizes its nodes in the cluster's report.
        env = os.environ | {
            "RAY_raylet_start_wait_time_s": str(START_TIMEOUT_S),
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id,
            "RAY_CLOUD_INSTANCE_ID": node_id,
            "RAY_NODE_TYPE_NAME": node_type,
            ray_constants.RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(resources),
            ray_constants.LABELS_ENVIRONMENT_VARIABLE: json.dumps(dict(labels)),
        }
        said = folder / "node.log"
        with said.open("wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        # Nodes start one after another, with more weight than running ones: a node aborts if its agents take over 15 s to
        # come up (Ray 2.60), which happens when a small machine starts four at once, or one beside busy engines.
        deadline = time.monotonic() + START_TIMEOUT_S
        while STARTED not in said.read_bytes() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        yield_to_those_who_start(process.pid)
        return process

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        with self.lock:
            for node_id, node in list(self._nodes.items()):
                if "node" in node and node["node"].poll() is not None:
                    end(self._nodes.pop(node_id)["node"])
        found: list[str] = super().non_terminated_nodes(tag_filters)
        return found

    def _terminate_node(self, node: Mapping[str, Any]) -> None:
        end(node["node"])


def yield_to_those_who_start(pid: int) -> None:
    """Gives the session of `pid` less weight. Niceness of a process counts within its session only, where the kernel groups
    processes by session (sched(7), "The autogroup feature"); where it doesn't, nothing happens."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(WORKING_NICENESS))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the node and all that it started: SIGTERM, and SIGKILL for what is left after `END_TIMEOUT_S`."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_TIMEOUT_S)
