"""Which tools a gateway has. A further tool is a class with these methods and its line in `build`."""

from __future__ import annotations

from typing import Protocol

from tool_sandbox.config import SandboxConfig
from tool_sandbox.metrics import Metrics
from tool_sandbox.pool import Pool
from tool_sandbox.python_tool import PythonTool
from tool_sandbox.search.tool import SearchTool
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


def build(config: SandboxConfig, metrics: Metrics) -> dict[str, Tool]:
    """Registry name → tool, of those that are configured."""
    tools: dict[str, Tool] = {"python": PythonTool(Pool(config, metrics))}
    if config.search.kind != "none":
        tools["search"] = SearchTool(config.search)
    return tools
