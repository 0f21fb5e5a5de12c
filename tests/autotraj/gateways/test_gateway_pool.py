"""A gateway a sandbox node: real raylets that join and leave, real gateways with containers, an actor that calls tools."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from pydantic import SecretStr
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tiny_run import tiny

from actors.config import ToolAccess
from actors.tools import Tools
from autotraj.config.run import ConfigError
from autotraj.errors import UserError
from autotraj.gateways.pool import GatewayPool, node_gateways
from tool_sandbox.config import SandboxConfig
from trajectory.types import ToolCall

SMALL = SandboxConfig(num_containers=1, slots_per_container=2, memory_mib=128, scratch_mib=16, token="t")


def start_caller(access: ToolAccess) -> Any:
    """What rollout actors do with tools, without an engine."""

    class Caller:  # within a function, so that it travels by value: workers can't import tests
        async def start(self, access: ToolAccess) -> None:
            self._tools = Tools(access)

        async def gateways(self) -> set[str]:
            return {site.address for site in self._tools._client.gateways}

        async def call(self, code: str) -> tuple[str, str, str]:
            result = await self._tools.call(ToolCall(tool="python", content=code), 10.0)
            return result.status, result.output, result.message

    # Not on a node that the test takes away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    caller = ray.remote(Caller).options(num_cpus=0, scheduling_strategy=here).remote()
    ray.get(caller.start.remote(access), timeout=60)
    return caller


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_sandbox_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=0, resources={"sandbox": 1}, object_store_memory=80 * 1024**2)


def gateway_processes() -> list[psutil.Process]:
    """Those of this test's own raylets."""
    return [
        p for p in psutil.process_iter(["cmdline"]) if "tool_sandbox.server" in (p.info["cmdline"] or []) and ours(p)
    ]


def ours(process: psutil.Process) -> bool:
    try:
        above = process.parents()
        return os.getpid() in [parent.pid for parent in above] and "raylet" in [parent.name() for parent in above]
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s until {what}"
        time.sleep(0.2)


@pytest.mark.ray
def test_what_keeps_gateways_from_coming_is_told(cluster: Cluster, tmp_path: Path) -> None:
    config = tiny(tmp_path, "place_by_role=true", "grpo.start_timeout_s=2")
    match = r"waited 2 s .*Ray resource `sandbox`; is such a node coming\?"
    with pytest.raises(UserError, match=match), node_gateways(config) as gateway:
        gateway.wait()
    node = add_sandbox_node(cluster)
    tls = [f'sandbox.tls.{name}="/no/such/file"' for name in ("cert", "key", "ca")]
    config = tiny(tmp_path, "place_by_role=true", "grpo.start_timeout_s=60", *tls)
    match = r"on sandbox node .*: sandbox\.tls\.key: /no/such/file can't be read"
    with pytest.raises(UserError, match=match), node_gateways(config) as gateway:
        gateway.wait()
    cluster.remove_node(node)
    wait_until(lambda: "sandbox" not in ray.cluster_resources(), "Ray has noticed")


@pytest.mark.ray
@pytest.mark.docker
def test_gateways_follow_the_nodes_and_actors_follow_the_gateways(cluster: Cluster) -> None:
    pool = GatewayPool(SMALL, num_gateways=1, start_timeout_s=120.0)
    pool.start()
    try:
        time.sleep(3.0)
        assert (pool.gateways, pool.problem) == ([], "")
        assert placement_group_table(pool._demand)["state"] == "PENDING"  # what an autoscaler goes by
        first = add_sandbox_node(cluster)
        wait_until(lambda: len(pool.gateways) == 1, "the first node has its gateway")
        wait_until(lambda: placement_group_table(pool._demand)["state"] == "CREATED", "the demand is met")

        token, directory = SecretStr("t"), pool.directory_name
        caller = start_caller(ToolAccess(sandbox_address="", sandbox_token=token, sandbox_directory=directory))

        def known() -> set[str]:
            return set(ray.get(caller.gateways.remote(), timeout=30))

        def agree(number: int) -> bool:
            addresses = {address for address, _ in pool.gateways}
            return len(addresses) == number and addresses == known()

        def calls_work(number: int = 8) -> None:
            calls = [caller.call.remote(f"print({n})") for n in range(number)]
            answers = ray.get(calls, timeout=120)
            assert [answer[:2] for answer in answers] == [("ok", f"{n}\n") for n in range(number)], answers

        calls_work()
        add_sandbox_node(cluster)
        wait_until(lambda: agree(2), "both know the second node's gateway")
        calls_work()

        # A gateway dies, its node lives: calls go on, and it comes back under another address.
        before = {address for address, _ in pool.gateways}
        gateway_processes()[0].send_signal(signal.SIGKILL)
        calls_work()
        wait_until(lambda: agree(2) and {a for a, _ in pool.gateways} != before, "the gateway is there again")
        calls_work()

        # The directory dies: the list holds, and is followed again once Ray has restarted it.
        ray.kill(pool._directory, no_restart=False)
        assert known() == {address for address, _ in pool.gateways}
        calls_work()

        # A node goes, with its gateway.
        cluster.remove_node(first)
        calls_work()
        wait_until(lambda: agree(1), "the lost node's gateway is dropped")
        calls_work()
    finally:
        pool.close()
    wait_until(lambda: not gateway_processes(), "no gateway is left", 30.0)


def test_more_gateways_than_one_need_nodes_for_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_gateways = 2 needs place_by_role = true"):
        tiny(tmp_path, "num_gateways=2")
