"""An actor's connection to the sandbox: one gateway, or several whose list changes while the actor runs.

    driver ──places gateways, publishes the list──▶ directory (a named Ray actor) ◀──asks every few seconds── actor

The actor asks for the list, so a new or restarted actor needs no message. While the directory doesn't answer, the last list
stays in use, and the client notices by itself when a gateway doesn't answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import ray

from actors.config import ToolAccess
from tool_sandbox.failover import FailoverClient, Site
from trajectory.types import ToolCall, ToolResult

logger = logging.getLogger(__name__)

FOLLOW_EVERY_S = 2.0
DIRECTORY_TIMEOUT_S = 10.0
"""Longest wait for the directory, seconds. It is short, as an actor can go on with its last list."""


class Tools:
    """Runs tool calls. Make it and use it inside one event loop."""

    def __init__(self, access: ToolAccess) -> None:
        """Connects with the first call. TlsError if the files of `sandbox_tls` can't be used on this node."""
        self._directory = access.sandbox_directory
        self._following: asyncio.Task[None] | None = None
        token = access.sandbox_token.get_secret_value() if access.sandbox_token else ""
        # Also for a single gateway: a call waits for one that is started again, and for one that is full for a moment.
        if self._directory:
            here = ray.get_runtime_context().get_node_id()
            self._client = FailoverClient(here=here, token=token, tls=access.sandbox_tls)
            self._following = asyncio.create_task(self._follow())
        else:
            self._client = FailoverClient([Site(access.sandbox_address)], token=token, tls=access.sandbox_tls)

    async def call(self, call: ToolCall, timeout_s: float) -> ToolResult:
        """Run one call; this is an `episode.CallTool`."""
        return await self._client.call(call.tool, call.content, timeout_s=timeout_s)

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await self._client.close()

    async def _follow(self) -> None:
        problem = ""
        while True:
            try:
                directory = await asyncio.to_thread(ray.get_actor, self._directory)
                # None: the directory has just started and doesn't have the list yet.
                listed: list[tuple[str, str]] | None = await asyncio.wait_for(
                    directory.gateways.remote(), DIRECTORY_TIMEOUT_S
                )
                if listed is not None:
                    self._client.set_gateways([Site(address, node) for address, node in listed])
                problem = ""
            except (
                Exception
            ) as error:  # Ray has many kinds of errors; for each of them the last list is better than none
                if not problem:
                    logger.warning(
                        "the list of sandbox gateways can't be read, so the last one stays in use: %s", error
                    )
                problem = str(error) or type(error).__name__
            await asyncio.sleep(FOLLOW_EVERY_S)
