"""A gateway on this machine, as a child process that ends with its parent.

with local_sandbox(num_containers=2) as client:
    client.call("python", "print(2+2)")
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import (
    AddressError,
    ContainerEngineError,
    GatewayError,
    ImageError,
    RunnerError,
    SandboxError,
    SearchError,
    TlsError,
)
from tool_sandbox.second_look import GRACE_S

ROOT = Path(__file__).resolve().parent.parent
STOP_TIMEOUT_S = 15.0
"""Added to `drain_s`, which running calls may take, seconds."""
_ERRORS: dict[str, type[SandboxError]] = {
    kind.__name__: kind for kind in (AddressError, ContainerEngineError, ImageError, RunnerError, SearchError, TlsError)
}


class LocalGateway:
    """The gateway process. `address` is set once it answers; `close` removes its containers.

    If this process is killed, the gateway notices within a second that its parent is gone, and stops. If the gateway is
    killed, its containers notice that their input has ended, and stop.
    """

    def __init__(self, config: SandboxConfig) -> None:
        """Start it and wait for a first ready container, at most `config.start_timeout_s`. Errors: the SandboxError that
        the gateway reported, with its remedy; GatewayError if it reported none."""
        self._stop_timeout_s = config.drain_s + STOP_TIMEOUT_S
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tool_sandbox.server", str(os.getpid())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for us: a step that is finished after it still calls tools
        )
        try:
            assert self._process.stdin is not None
            # By a pipe and not by the command line, where every user could read the token.
            self._process.stdin.write(config.model_dump_json().encode())
            self._process.stdin.close()
            self.address = self._wait_ready(config.start_timeout_s + 5.0)
        except BaseException:
            self.close()
            raise

    def _wait_ready(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        deadline, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            left_s = max(
                deadline - time.monotonic(), GRACE_S
            )  # read once more, in case this process was stopped meanwhile
            if not select.select([stdout], [], [], left_s)[0]:
                raise GatewayError(
                    f"waited {timeout_s:.0f} s on the sandbox gateway, which isn't ready; see its log above"
                )
            if not (chunk := os.read(stdout, 65536)):
                raise GatewayError(f"the sandbox gateway ended with code {self._process.wait(10)}; see its log above")
            line += chunk
        message = json.loads(line)
        if "error" in message:
            raise _ERRORS.get(message["kind"], GatewayError)(message["error"])
        self.metrics_address = str(message["metrics_address"])
        return str(message["address"])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The process's exit code; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        """Wait for a gateway that ends by itself; returns its exit code. Errors: subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def close(self) -> None:
        """Stop the gateway and its containers, with SIGKILL if that takes longer than `drain_s` and 15 s."""
        self._process.terminate()
        try:
            self._process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def __enter__(self) -> LocalGateway:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def local_sandbox(config: SandboxConfig | None = None, **settings: Any) -> Iterator[SandboxClient]:
    """Start a gateway and yield a client of it. `settings` are fields of `SandboxConfig` that replace those of `config`."""
    base = config.model_dump() if config is not None else {}
    config = SandboxConfig.model_validate({**base, **settings})
    with (
        LocalGateway(config) as gateway,
        SandboxClient(
            gateway.address, token=config.token, tls=config.tls, queue_timeout_s=config.queue_timeout_s
        ) as client,
    ):
        yield client
