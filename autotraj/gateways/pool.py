"""Runs a sandbox gateway on every sandbox node. Nodes join and leave, and gateways die and are started again.

    Ray's nodes ──look, every second──▶ one GatewayActor for each node that offers the resource `sandbox`
                                          │ ready                     └─ died or hangs: once more, after a pause
                                          ▼
                                     directory ◀── actors that run tools

A thread does the looking, so that it continues in every stage. It only asks Ray for the present state and creates or ends
actors, and never waits. **Nodes are requested** by a placement group of `num_gateways` bundles, each on a different node.
For the autoscaler that is demand for this many sandbox nodes, at the start and again when one is lost. Further nodes get
a gateway too when they join. None is removed during the run, since a gateway makes its node busy.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autotraj.config.run import RunConfig
from autotraj.errors import UserError
from autotraj.gateways.node import GatewayActor, GatewayDirectory
from autotraj.gateways.session import GatewayAccess, gateway_that_is_there
from autotraj.runners.calls import end_actor
from cluster.roles import SANDBOX, role
from tool_sandbox.config import SandboxConfig

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
STOP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 10.0
"""Longest wait for something that Ray has reported as ready, seconds."""
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
"""Pause before a gateway is started again on its node, seconds; doubles with each failure."""
MAX_FAILURES = 6
"""A node whose gateway failed this often in a row gets no further gateway."""
STABLE_S = 600.0
"""A gateway that was ready for this long has its failures forgotten, seconds."""


@dataclass(slots=True)
class _Node:
    """A sandbox node and its gateway. Times are of the monotonic clock."""

    actor: Any = None
    call: Any = None  # ObjectRef: of `start` until there is an address, then of `watch`
    address: str = ""
    since: float = 0.0  # of its start, or of the time when it became ready
    num_failures: int = 0
    not_before: float = 0.0


class GatewayPool:
    """The gateways of a run, owned by the driver. Call `start`; read `gateways` and `problem` as of the last look;
    `close`."""

    def __init__(self, config: SandboxConfig, *, num_gateways: int, start_timeout_s: float) -> None:
        self._config, self._start_timeout_s = config, start_timeout_s
        self._run = uuid.uuid4().hex[:6]  # an actor's name must be unique in the namespace
        self._nodes: dict[str, _Node] = {}
        self._published: Any = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="gateway-pool", daemon=True)
        self.gateways: list[tuple[str, str]] = []
        """Address and node id of those that are ready."""
        self.problem = ""
        """The newest reason, while the gateways of all known nodes have failed."""
        self.directory_name = f"sandbox-gateways-{self._run}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._directory = (
            ray.remote(GatewayDirectory)
            .options(name=self.directory_name, num_cpus=0, max_restarts=-1, scheduling_strategy=here)
            .remote()
        )
        bundles = [role(SANDBOX, by_role=True)] * num_gateways
        self._demand = placement_group(bundles, strategy="STRICT_SPREAD", name=f"sandbox-nodes-{self._run}")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End all gateways, within `STOP_TIMEOUT_S` or by force."""
        self._closing.set()
        self._thread.join(STOP_TIMEOUT_S)
        actors = [node.actor for node in self._nodes.values() if node.actor is not None]
        if stops := [actor.stop.remote() for actor in actors]:
            ray.wait(stops, num_returns=len(stops), timeout=STOP_TIMEOUT_S)
        for actor in (*actors, self._directory):
            end_actor(actor)
        remove_placement_group(self._demand)

    # --- one look -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Start or drop gateways so that each node has one. Never waits."""
        alive = {n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get(SANDBOX, 0.0) > 0.0}
        for node_id in self._nodes.keys() - alive:
            logger.warning("sandbox node %s left; its gateway is dropped", node_id[:8])
            self._end(self._nodes.pop(node_id))
        now = time.monotonic()
        for node_id in alive:
            node = self._nodes.setdefault(node_id, _Node())
            if node.call is not None:
                self._check(node_id, node, now)
            elif now >= node.not_before:
                self._place(node_id, node, now)
        self.gateways = sorted((node.address, node_id) for node_id, node in self._nodes.items() if node.address)
        # At every look, changed or not, as the directory may have been restarted.
        if self._published is None or ray.wait([self._published], timeout=0)[0]:
            self._published = self._directory.publish.remote(self.gateways)

    def _place(self, node_id: str, node: _Node, now: float) -> None:
        node.actor = (
            ray.remote(GatewayActor)
            .options(
                name=f"sandbox-gateway-{node_id[:8]}-{self._run}-{node.num_failures}",
                num_cpus=0,
                resources=role(SANDBOX, by_role=True),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                max_concurrency=3,
            )
            .remote()
        )
        node.call, node.since = node.actor.start.remote(self._config), now

    def _check(self, node_id: str, node: _Node, now: float) -> None:
        """Handle the answer of the gateway's actor, if there is one."""
        if not ray.wait([node.call], timeout=0)[0]:
            if not node.address and now > node.since + self._start_timeout_s:
                self._failed(node_id, node, f"not up within {self._start_timeout_s:g} s (grpo.start_timeout_s)")
            return
        try:
            answer = ray.get(node.call, timeout=ANSWER_TIMEOUT_S)
        except RayError as error:
            self._failed(node_id, node, f"its actor died: {error}")
            return
        if node.address:  # `watch` has returned
            self._failed(node_id, node, answer)
            return
        address, problem = answer
        if problem:
            self._failed(node_id, node, problem)
            return
        logger.info("sandbox gateway %s is up on node %s", address, node_id[:8])
        self.problem = ""
        node.address, node.call, node.since = address, node.actor.watch.remote(), now

    def _failed(self, node_id: str, node: _Node, reason: str) -> None:
        now = time.monotonic()
        if node.address and now > node.since + STABLE_S:
            node.num_failures = 0
        node.num_failures += 1
        pause_s = min(FIRST_PAUSE_S * 2 ** (node.num_failures - 1), MAX_PAUSE_S)
        node.not_before = now + pause_s if node.num_failures < MAX_FAILURES else math.inf
        self._end(node)
        node.actor, node.call, node.address = None, None, ""
        if all(other.num_failures and not other.address for other in self._nodes.values()):
            self.problem = reason
        what = f"again in {pause_s:g} s" if node.num_failures < MAX_FAILURES else "the node is left without one"
        logger.warning("the sandbox gateway on node %s failed (%s): %s", node_id[:8], what, reason)

    @staticmethod
    def _end(node: _Node) -> None:
        if node.actor is not None:
            with suppress(RayError):  # it is already gone
                ray.kill(node.actor)

    def _keep_looking(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            try:
                self.look()
            except Exception:  # Ray has many kinds of exceptions, and a failed look is better than a thread that ends
                logger.exception("the sandbox nodes could not be looked at; gateways stay as they are")


def _wait_first(pool: GatewayPool, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not pool.gateways:
        if pool.problem:
            raise UserError(f"no sandbox gateway could be started: {pool.problem}")
        if time.monotonic() > deadline:
            raise UserError(
                f"waited {timeout_s:g} s (grpo.start_timeout_s) on a sandbox gateway on a node with the Ray resource "
                f"`{SANDBOX}`; is such a node coming? `ray status` on the head says"
            )
        time.sleep(0.1)


@contextmanager
def node_gateways(config: RunConfig) -> Iterator[GatewayAccess]:
    """The gateway at `gateway` if that is set, else one on each sandbox node, for the duration of the block.

    The block is entered at once: nodes and gateways start while the engines do. `GatewayAccess.wait` returns when the
    first is ready. It raises UserError if no sandbox node came within `grpo.start_timeout_s`, or if no gateway could
    start on them.
    """
    token, limit = config.sandbox.token or None, config.grpo.start_timeout_s
    if config.gateway is not None:
        yield gateway_that_is_there(config, config.gateway)
        return
    token = token or secrets.token_hex(32)  # a gateway that listens beyond loopback needs one
    settings = SandboxConfig.model_validate(config.sandbox.model_dump() | {"token": token})
    pool = GatewayPool(settings, num_gateways=config.num_gateways, start_timeout_s=limit)
    try:
        pool.start()
        yield GatewayAccess("", token, config.sandbox.tls, pool.directory_name, wait=lambda: _wait_first(pool, limit))
    finally:
        pool.close()
