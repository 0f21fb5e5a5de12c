"""Which tools a gateway has: those of `trajectory.tools` that are configured.

What runs a further one is a class with these methods and its line in `RUNNERS`.
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
    """Used inside the gateway's event loop, after `open`."""

    def open(self) -> None:
        """Starts and reads, before there is a loop or a client, what only the user who started the gateway may: the gateway
        gives that up next. Errors: SandboxError, with the remedy."""

    @property
    def broken(self) -> str:
        """Why it can't work any more, so that the gateway ends; empty if it can."""
        ...

    async def start(self) -> None:
        """Ready for calls when it returns. Errors: SandboxError, with the remedy."""

    async def close(self) -> None:
        """Ends what runs, also after a `start` that failed or never came; what waits is answered `unavailable`."""

    async def run(
        self, content: str, *, timeout_s: float, queue_s: float, session_id: str | None, client: str
    ) -> ToolResult:
        """One call of `client`, a connection: `timeout_s` seconds of execution after `queue_s` of waiting, both at most.
        A failure is a result. Cancelling it ends what it started."""
        ...


def python(config: SandboxConfig, metrics: Metrics) -> Tool:
    return PythonTool(Pool(config, metrics))


def search(config: SandboxConfig, metrics: Metrics) -> Tool | None:
    return SearchTool(config.search) if config.search.kind != "none" else None


RUNNERS: dict[str, Callable[[SandboxConfig, Metrics], Tool | None]] = {"python": python, "search": search}
"""Name of a tool (`trajectory.tools`) → what makes the one that runs its calls; None: it isn't configured."""


def build_tools(config: SandboxConfig, metrics: Metrics) -> dict[str, Tool]:
    """Name → tool, of those that are configured. Raises SandboxError for one that a model can call and nothing can run."""
    names = dict.fromkeys(spec.name for spec in TOOLS.values())
    if missing := sorted(names.keys() - RUNNERS.keys()):
        raise SandboxError(f"nothing runs the tool {missing[0]!r}: add what makes it to tool_sandbox.registry.RUNNERS")
    made = {name: RUNNERS[name](config, metrics) for name in names}
    return {name: tool for name, tool in made.items() if tool is not None}
