"""The sandbox as a run sees it, a gateway that is there or one of the run's own; and the commands `sandbox …`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from autotraj.config import RunConfig, load_section
from autotraj.errors import UserError
from tool_sandbox import build as image_build
from tool_sandbox import server
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import SandboxError
from tool_sandbox.local import LocalGateway


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where tool calls go."""

    address: str
    token: str | None = field(default=None, repr=False)


@contextmanager
def sandbox_session(config: RunConfig) -> Iterator[Gateway]:
    """The run's gateway, up for the length of the block: the one at `gateway`, or one started with `[sandbox]`."""
    token = config.sandbox.token or None
    if config.gateway is not None:
        yield Gateway(config.gateway, token)
        return
    try:
        local = LocalGateway(config.sandbox)
    except SandboxError as error:
        raise UserError(str(error)) from error
    with local:
        yield Gateway(local.address, token)


def serve(config_path: str | None, overrides: Sequence[str]) -> int:
    """`python -m autotraj sandbox serve`: a gateway in the foreground."""
    config = load_section(SandboxConfig, "sandbox", config_path, overrides)
    try:
        server.run(config)
    except SandboxError as error:
        raise UserError(str(error)) from error
    return 0


def build(config_path: str | None, overrides: Sequence[str]) -> int:
    """`python -m autotraj sandbox build`: makes the image unless it is there."""
    config = load_section(SandboxConfig, "sandbox", config_path, overrides)
    try:
        image_build.ensure_image(config)
    except SandboxError as error:
        raise UserError(str(error)) from error
    return 0
