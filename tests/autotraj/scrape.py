"""What a live Ray exports, and what the Grafana dashboard asks for."""

import contextlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "cluster/grafana_dashboard.json"
UNPACKED = ROOT / "build/prometheus/usr/bin/prometheus"
"""Where `make test` puts Debian's package, see tests/debian_prometheus.sh."""
METRIC = re.compile(r"\bray_autotraj_\w+")


def queries() -> dict[str, list[str]]:
    """Panel's title → its queries."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {p["title"]: [t["expr"] for t in p["targets"]] for p in panels if p["type"] != "row"}


def labels_of(query: str, legend: str) -> set[str]:
    """The labels that a query groups by and its legend shows."""
    grouped = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(",")}
    return (grouped | set(re.findall(r"{{(\w+)}}", legend))) - {"le"}


def endpoints() -> list[str]:
    """`host:port` of the metrics agent of every node."""
    return [f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in ray.nodes() if n["Alive"]]


def exported() -> dict[str, set[str]]:
    """Every exported series' name of ours → its labels."""
    found: dict[str, set[str]] = {}
    for endpoint in endpoints():
        text = urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=10).read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_autotraj_"):
                    found.setdefault(sample.name, set()).update(sample.labels)
    return found


def wait_exported(wanted: set[str], timeout_s: float, meanwhile: Callable[[], None]) -> dict[str, set[str]]:
    """`exported()` once it has all of `wanted`: workers report at intervals."""
    deadline = time.monotonic() + timeout_s
    while missing := wanted - set(found := exported()):
        assert time.monotonic() < deadline, f"not exported after {timeout_s} s: {sorted(missing)}"
        meanwhile()
        time.sleep(1.0)
    return found


class Prometheus:
    """A real server, asked over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def has_data(self, query: str) -> bool:
        """Whether the answer holds a number: a rate over nothing answers, too, with NaN."""
        return any(math.isfinite(float(series["value"][1])) for series in self.ask(query))

    def ask(self, query: str) -> list[dict[str, Any]]:
        """An instant query's series."""
        parameters = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{parameters}", timeout=10) as answer:
            reply = json.load(answer)
        assert reply["status"] == "success", reply
        result: list[dict[str, Any]] = reply["data"]["result"]
        return result


def find_prometheus() -> str | None:
    """The server's binary; None, with a warning, where it can't be had. As root on Debian it must be there."""
    if binary := shutil.which("prometheus") or (str(UNPACKED) if UNPACKED.is_file() else None):
        return binary
    if os.geteuid() == 0 and shutil.which("apt-get"):
        pytest.fail("no Prometheus: run `make prometheus`, which `make test` does")
    warnings.warn("no Prometheus here (make prometheus): the dashboard's queries weren't asked", stacklevel=2)
    return None


def wait_listening(process: subprocess.Popen[bytes], port: int, timeout_s: float) -> None:
    """On a loaded machine a server takes its time to come up."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
            return
        assert process.poll() is None, f"prometheus ended with {process.returncode}"
        assert time.monotonic() < deadline, f"prometheus does not listen after {timeout_s} s"
        time.sleep(0.2)


@contextmanager
def prometheus(folder: Path) -> Iterator[Prometheus | None]:
    """Debian's `prometheus`, which scrapes every node of this process's Ray each second; None where it can't be had."""
    binary = find_prometheus()
    if binary is None:
        yield None
        return
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": endpoints()}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    arguments = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [binary, *arguments, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    try:
        wait_listening(process, port, timeout_s=60.0)
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
