"""The tools of a gateway: those of `trajectory.tools` that are configured.

To run a further one, write a class with the methods below and add a line to `RUNNERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import SandboxError
from tool_sandbox.metrics import Metrics
from tool_sandbox.pool import Pool
from tool_sandbox.python_tool import PythonTool
from tool_sandbox.search.tool import SearchTool
from trajectory.tools import TOOLS
from trajectory.types import ToolResult


class Tool(Protocol):
    """A tool. After `open` it is used inside the gateway's event loop."""

    def open(self) -> None:
        """Open and read all that only the user who started the gateway may, as the gateway gives up these rights next. It is
        called before there is a loop or a client. Errors: SandboxError, which says what to do."""

    @property
    def broken(self) -> str:
        """Why the tool can't work any more, so that the gateway ends; empty as long as it can."""
        ...

    async def start(self) -> None:
        """Returns when the tool is ready for calls. Errors: SandboxError, which says what to do."""

    async def close(self) -> None:
        """End running calls and answer waiting ones `unavailable`, also if `start` failed or was never called."""

    async def run(
        self, content: str, *, timeout_s: float, queue_s: float, session_id: str | None, client: str
    ) -> ToolResult:
        """Run one call of `client`, a connection: after at most `queue_s` seconds of waiting, at most `timeout_s` seconds of
        execution. A failure is a result. Cancelling this coroutine ends what it started."""
        ...


def python(config: SandboxConfig, metrics: Metrics) -> Tool:
    return PythonTool(Pool(config, metrics))


def search(config: SandboxConfig, metrics: Metrics) -> Tool | None:
    return SearchTool(config.search) if config.search.kind != "none" else None


RUNNERS: dict[str, Callable[[SandboxConfig, Metrics], Tool | None]] = {"python": python, "search": search}
"""Name of a tool (`trajectory.tools`) → function that makes the object which runs its calls; None: it isn't configured."""


def build_tools(config: SandboxConfig, metrics: Metrics) -> dict[str, Tool]:
    """The configured tools: name → tool. Raises SandboxError for a tool that a model can call and that nothing can run."""
    names = dict.fromkeys(spec.name for spec in TOOLS.values())
    if missing := sorted(names.keys() - RUNNERS.keys()):
        raise SandboxError(f"nothing runs the tool {missing[0]!r}: add what makes it to tool_sandbox.registry.RUNNERS")
    made = {name: RUNNERS[name](config, metrics) for name in names}
    return {name: tool for name, tool in made.items() if tool is not None}
