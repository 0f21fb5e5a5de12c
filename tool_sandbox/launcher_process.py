"""The process that may use the container engine, on behalf of a gateway that may not.

    gateway, nobody ──{"op": "start"}──────────▶ launcher ──docker run──▶ engine
                    ◀──a name, three pipe ends──
                    ──{"op": "kill", "name"}───▶          ──docker kill─▶

`python -m tool_sandbox.launcher_process FD`: FD is a SOCK_SEQPACKET socket, and its first message holds the settings. After
that the gateway may send only the two orders above. No part of a command comes from the gateway: the settings are read
before it has any client, names are made here, and only a name that was made here can be killed. So an attacker who takes
over the gateway gets a bounded number of containers, as hardened as the others, and no access to the engine.

When the gateway's end closes, whatever the cause, its containers are removed, and this process ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from tool_sandbox import build
from tool_sandbox.config import SandboxConfig
from tool_sandbox.docker_command import docker_command
from tool_sandbox.errors import SandboxError
from tool_sandbox.left_behind import remove_left_behind

MAX_ORDER_BYTES = 4096
MAX_SETTINGS_BYTES = 64 * 1024
KILL_TIMEOUT_S = 10.0
"""Time for `docker kill`, and then for `docker run` to notice; after that `docker run` itself is killed."""
REMOVE_TIMEOUT_S = 60.0
CHECK_S = 1.0


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    pidfd: int
    killer: subprocess.Popen[bytes] | None = None
    give_up: float = float("inf")


def max_containers(config: SandboxConfig) -> int:
    """Most containers of one gateway at a time: those in service, the spares, as many that retire, and one more of each."""
    return 2 * (config.num_containers + config.num_spares + 1)


class LauncherProcess:
    """Waits, in one thread, for orders and for its children to end."""

    def __init__(self, control: socket.socket, config: SandboxConfig, user_ids: range) -> None:
        self._control = control
        self._config = config
        self._user_ids = user_ids
        self._prefix = f"autotraj-{os.getppid()}-{secrets.token_hex(3)}"
        self._num_made = 0
        self._running: dict[str, _Running] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, None)

    def serve(self) -> None:
        """Serve until the gateway is gone."""
        try:
            while True:
                for key, _ in self._selector.select(CHECK_S):
                    if key.data is not None:
                        self._ended(key.data)
                    elif not self._obey():
                        return
                self._give_up()
        except BrokenPipeError:
            return  # the gateway is gone
        finally:
            self._remove_all()

    def _obey(self) -> bool:
        """Carry out one order. False if there will be no more."""
        try:
            data = self._control.recv(MAX_ORDER_BYTES)  # the kernel closes descriptors that are sent with it
        except ConnectionError:
            return False
        if not data:
            return False
        try:
            order = json.loads(data)
        except (ValueError, RecursionError):
            order = None
        match order:
            case {"op": "start", **rest} if not rest:
                self._start()
            case {"op": "kill", "name": str(name), **rest} if not rest and name in self._running:
                self._kill(self._running[name], name)
            case {"op": "kill", "name": str(name), **rest} if not rest and name.startswith(self._prefix):
                pass  # it has already ended, and the gateway will get the message
            case _:
                self._tell(
                    {"op": "refused", "error": "the launcher starts containers, and kills its own, and nothing else"}
                )
        return True

    def _start(self) -> None:
        """Start a container. Answers `started`, with the container's stdin, stdout and stderr, or `failed`."""
        if len(self._running) >= (limit := max_containers(self._config)):
            self._tell({"op": "failed", "error": f"{limit} containers of this gateway run already"})
            return
        self._num_made += 1
        name = f"{self._prefix}-{self._num_made}"
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                docker_command(name, self._config, self._user_ids),
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
            )
        except OSError as error:
            self._tell({"op": "failed", "error": f"docker can't be started: {error}"})
            return
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        ends = (process.stdin, process.stdout, process.stderr)
        self._running[name] = _Running(process, os.pidfd_open(process.pid))
        self._selector.register(self._running[name].pidfd, selectors.EVENT_READ, name)
        try:
            self._tell({"op": "started", "name": name}, [end.fileno() for end in ends])
        finally:
            for end in ends:
                end.close()

    def _kill(self, running: _Running, name: str) -> None:
        if running.killer is None:
            quiet = subprocess.DEVNULL
            running.killer = subprocess.Popen(["docker", "kill", name], stdin=quiet, stdout=quiet, stderr=quiet)
            running.give_up = time.monotonic() + KILL_TIMEOUT_S

    def _ended(self, name: str) -> None:
        """`docker run` has ended, and so has the container."""
        running = self._running.pop(name)
        self._selector.unregister(running.pidfd)
        os.close(running.pidfd)
        running.process.wait()
        if running.killer is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.killer.wait(KILL_TIMEOUT_S)
        self._tell({"op": "ended", "name": name})

    def _give_up(self) -> None:
        """Kill a `docker run` that doesn't notice that its container has ended."""
        for running in self._running.values():
            if running.give_up < time.monotonic():
                for process in (running.killer, running.process):
                    if process is not None:
                        process.kill()
                running.give_up = float("inf")

    def _remove_all(self) -> None:
        """Remove all containers. They end by themselves when their input ends; this is for one that doesn't."""
        if not self._running:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            command = ["docker", "rm", "--force", *self._running]
            subprocess.run(command, capture_output=True, timeout=REMOVE_TIMEOUT_S, check=False)
        for running in self._running.values():
            running.process.kill()

    def _tell(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        socket.send_fds(self._control, [json.dumps(message).encode()], descriptors or [])


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the gateway; when that ends, this process ends too
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s sandbox launcher: %(message)s")
    control = socket.socket(fileno=int(sys.argv[1]))
    config = SandboxConfig.model_validate_json(control.recv(MAX_SETTINGS_BYTES))
    try:
        build.check_ready(config)
        user_ids = build.user_ids()
    except SandboxError as error:
        with contextlib.suppress(BrokenPipeError):
            control.send(json.dumps({"op": "broken", "kind": type(error).__name__, "error": str(error)}).encode())
        return 1
    remove_left_behind()
    launcher = LauncherProcess(control, config, user_ids)
    with contextlib.suppress(BrokenPipeError):
        control.send(b'{"op": "ready"}')
        launcher.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
