"""The gateway: one gRPC method in front of the tools: a pool of containers, and a search if one is set.

`python -m tool_sandbox.server PARENT_PID` is what `local_sandbox` starts: settings as JSON on stdin, one line of JSON on
stdout when it is ready (`{"address": …}`) or can't be (`{"error": …}`); it serves until SIGTERM or its parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import signal
import sys
from collections.abc import Callable

import grpc
import grpc.aio

from tool_sandbox import registry, wire
from tool_sandbox.client import MARGIN_S
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import AddressError, SandboxError, WireError
from trajectory.types import ToolResult

logger = logging.getLogger(__name__)

DRAIN_S = 2.0
PARENT_CHECK_S = 1.0

_OPTIONS = [
    ("grpc.max_receive_message_length", wire.MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", wire.MAX_REPLY_BYTES),
    ("grpc.so_reuseport", 0),  # a second gateway on the same port is a mistake, not a second listener
]


class Gateway:
    """Serves one set of tools. `start`, then `address`; `stop`."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._tools = registry.build(config)
        self._server = grpc.aio.server(options=_OPTIONS)
        self.address = ""

    async def start(self) -> None:
        """Listen, then start the tools. Errors: SandboxError, with the remedy."""
        handler = grpc.unary_unary_rpc_method_handler(self._call)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(wire.SERVICE, {wire.CALL: handler}),)
        )
        host, _, _ = self._config.address.rpartition(":")
        try:
            port = self._server.add_insecure_port(self._config.address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise AddressError(
                f"sandbox.address: can't listen on {self._config.address}, the port is in use or not ours; choose another, "
                "or port 0 for a free one"
            )
        # What is quick to fail goes first: no containers for a gateway that lacks its search index.
        for name in sorted(self._tools, reverse=True):
            await self._tools[name].start()
        await self._server.start()
        self.address = f"{host}:{port}"

    async def stop(self) -> None:
        # Together: new calls are refused, those that run or wait are answered, and gRPC has time to send the answers.
        await asyncio.gather(self._server.stop(DRAIN_S), *(tool.close() for tool in self._tools.values()))

    async def _call(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """One tool call. Cancelling it, or losing the client, cancels this coroutine and kills the code."""
        if self._config.token:
            sent = dict(context.invocation_metadata() or ()).get(wire.TOKEN_KEY, "")
            if not hmac.compare_digest(str(sent).encode(), self._config.token.encode()):
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token")
        try:
            request = wire.decode_request(data)
        except WireError as error:
            return wire.encode_result(ToolResult(status="rejected", message=str(error)))
        refusal = self._refuse(request)
        if refusal:
            return wire.encode_result(ToolResult(status="rejected", message=refusal))
        left_s = context.time_remaining()
        queue_s = self._config.queue_timeout_s
        if left_s is not None:  # leave the code its time: an answer after the client's deadline helps nobody
            queue_s = max(0.0, min(queue_s, left_s - request.timeout_s - MARGIN_S / 2))
        result = await self._tools[request.tool].run(
            request.content, timeout_s=request.timeout_s, queue_s=queue_s, session_id=request.session_id
        )
        return wire.encode_result(result)

    def _refuse(self, request: wire.CallRequest) -> str:
        """Why a well-formed request isn't run; empty if it is."""
        config = self._config
        if request.tool not in self._tools:
            return f"no tool named {request.tool!r} here; there is {', '.join(sorted(self._tools))}"
        if request.timeout_s > config.max_timeout_s:
            return f"timeout_s={request.timeout_s:g} exceeds sandbox.max_timeout_s={config.max_timeout_s:g}"
        size = len(request.content.encode("utf-8", "surrogatepass"))
        if size > config.max_content_bytes:
            return f"{size} bytes of content exceed sandbox.max_content_bytes={config.max_content_bytes}"
        return ""


async def _serve(config: SandboxConfig, announce: Callable[[str], None], parent: int | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    async def told_to_stop() -> None:
        while not stop.is_set() and (parent is None or os.getppid() == parent):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), PARENT_CHECK_S)

    gateway = Gateway(config)
    starting, stopping = asyncio.create_task(gateway.start()), asyncio.create_task(told_to_stop())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            announce(gateway.address)
            await stopping
    finally:
        starting.cancel()
        await asyncio.wait({starting})
        await gateway.stop()


def run(config: SandboxConfig) -> None:
    """Serve in the foreground until SIGINT or SIGTERM. Errors: SandboxError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(_serve(config, lambda address: print(f"sandbox gateway on {address}", flush=True), parent=None))


def main() -> int:
    """The child process of `local_sandbox`."""
    parent = int(sys.argv[1])
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s sandbox gateway: %(message)s")
    config = SandboxConfig.model_validate_json(sys.stdin.read())

    def announce(address: str) -> None:
        print(json.dumps({"address": address}), flush=True)

    try:
        asyncio.run(_serve(config, announce, parent))
    except SandboxError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
