"""The run's sandbox gateway on a sandbox node of the cluster: an actor, as everything that a run starts elsewhere.

    driver ──creates──▶ GatewayActor on a node with the resource `sandbox` ──▶ LocalGateway ──▶ containers
    rollout actors ──gRPC, token──▶ that node's address

A gateway that listens beyond loopback needs a token; a run without one in `sandbox.token` gets one of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray.exceptions import GetTimeoutError, RayError

from autotraj.config import RunConfig
from autotraj.errors import UserError
from autotraj.gateway_metrics import GatewayWatch
from autotraj.sandbox import Gateway, make_index
from cluster.roles import SANDBOX, role
from tool_sandbox import build
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import SandboxError
from tool_sandbox.local import LocalGateway

STOP_TIMEOUT_S = 30.0


class GatewayActor:
    """Holds the gateway of its node; a gateway notices its actor's end, and removes its containers."""

    def __init__(self) -> None:
        self._gateway: LocalGateway | None = None
        self._watch: GatewayWatch | None = None

    def __repr__(self) -> str:
        return "GatewayActor"

    def start(self, config: SandboxConfig) -> tuple[str, str]:
        """The gateway's address, and an empty string or what is wrong."""
        try:
            # The address of a node of another cloud's network can't be known here: it is what Ray's own traffic uses.
            host = ray.util.get_node_ip_address()
            config = SandboxConfig.model_validate(config.model_dump() | {"address": f"{host}:0"})
            make_index(config.search)
            build.ensure_image(config)
            self._gateway = LocalGateway(config)
        except (SandboxError, ValueError) as error:
            return "", f"on sandbox node {ray.util.get_node_ip_address()}: {error}"
        self._watch = GatewayWatch(self._gateway.address, config.token, config.tls)
        return self._gateway.address, ""

    def stop(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._gateway is not None:
            self._gateway.close()


@contextmanager
def node_gateway(config: RunConfig) -> Iterator[Gateway]:
    """The gateway at `gateway` if that is set, else one on a sandbox node, up for the length of the block.

    Raises UserError if no sandbox node came within `grpo.start_timeout_s`, or the gateway couldn't start on it.
    """
    if config.gateway is not None:
        yield Gateway(config.gateway, config.sandbox.token or None)
        return
    token = config.sandbox.token or secrets.token_hex(32)
    settings = SandboxConfig.model_validate(config.sandbox.model_dump() | {"token": token})
    actor = ray.remote(GatewayActor).options(num_cpus=0, resources=role(SANDBOX, by_role=True)).remote()
    try:
        try:
            address, problem = ray.get(actor.start.remote(settings), timeout=config.grpo.start_timeout_s)
        except GetTimeoutError:
            raise UserError(
                f"waited {config.grpo.start_timeout_s:g} s (grpo.start_timeout_s) on a sandbox gateway on a node with "
                f"the Ray resource `{SANDBOX}`; is such a node coming? `ray status` on the head says"
            ) from None
        except RayError as error:
            raise UserError(f"the sandbox gateway's actor died at its start: {error}") from error
        if problem:
            raise UserError(problem)
        yield Gateway(address, token)
    finally:
        with suppress(RayError):  # gone with its node, or it never had one; a gateway ends with its actor
            ray.get(actor.stop.remote(), timeout=STOP_TIMEOUT_S)
        ray.kill(actor)
