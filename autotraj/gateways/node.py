"""The Ray actors that a run with `place_by_role` starts for its tools: a gateway on each sandbox node, and their list.

    GatewayActor on a sandbox node ──▶ LocalGateway, a process ──▶ containers
    GatewayDirectory beside the driver ◀──asks── actors that run tools

`pool.py` creates and watches both.
"""

from __future__ import annotations

import os
import signal
import threading

import ray

from autotraj.gateways.metrics import GatewayWatch
from autotraj.gateways.session import make_index
from tool_sandbox import build
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import SandboxError
from tool_sandbox.local import LocalGateway

WATCH_EVERY_S = 1.0
HUNG_AFTER_S = 45.0
"""A gateway that answered none of `GatewayWatch`'s questions for this long counts as hanging, seconds."""


class GatewayActor:
    """Holds the gateway of its node. The gateway notices when its actor ends, and removes its containers. `watch` blocks, so
    the actor needs one thread for it and one more."""

    def __init__(self) -> None:
        self._gateway: LocalGateway | None = None
        self._stopping = threading.Event()
        self._watch: GatewayWatch | None = None

    def __repr__(self) -> str:
        return "GatewayActor"

    def start(self, config: SandboxConfig) -> tuple[str, str]:
        """Start the gateway; returns its address and an empty text, or an empty text and the problem."""
        # The node's address in a network of several clouds can't be known here, so it is the one that Ray's traffic uses.
        host = ray.util.get_node_ip_address()
        try:
            config = SandboxConfig.model_validate(config.model_dump() | {"address": f"{host}:0"})
            make_index(config.search)
            build.ensure_image(config)
            self._gateway = LocalGateway(config)
        except (SandboxError, ValueError) as error:
            return "", f"on sandbox node {host}: {error}"
        self._watch = GatewayWatch(self._gateway.address, config.token, config.tls)
        return self._gateway.address, ""

    def watch(self) -> str:
        """Wait until the gateway has ended or hangs; returns which. A gateway that hangs is killed."""
        assert self._gateway is not None, "start() returned an address"
        assert self._watch is not None
        while not self._stopping.wait(WATCH_EVERY_S):
            if (code := self._gateway.exit_code) is not None:
                return f"the gateway process ended with code {code}"
            if (silent_s := self._watch.silent_s) > HUNG_AFTER_S:
                os.kill(self._gateway.pid, signal.SIGKILL)  # a stopped process would not notice that its parent is gone
                return f"the gateway hung: it answered nothing for {silent_s:.0f} s"
        return "the gateway was told to stop"

    def stop(self) -> None:
        self._stopping.set()
        if self._watch is not None:
            self._watch.close()
        if self._gateway is not None:
            self._gateway.close()


class GatewayDirectory:
    """Knows which gateways live. Ray restarts it if it dies. Until the driver has sent the list, it answers None."""

    def __init__(self) -> None:
        self._gateways: list[tuple[str, str]] | None = None

    def __repr__(self) -> str:
        return "GatewayDirectory"

    def publish(self, gateways: list[tuple[str, str]]) -> None:
        self._gateways = gateways

    def gateways(self) -> list[tuple[str, str]] | None:
        """Address and node id of each gateway; None: not known yet."""
        return self._gateways
