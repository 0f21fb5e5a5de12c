"""The sandbox of a run: a gateway that already runs, or one that the run starts."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from actors.config import ToolAccess
from autotraj.config.run import RunConfig
from autotraj.errors import UserError
from tasks.word_problems import corpus as word_problems_corpus
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig, SearchConfig, TlsFiles
from tool_sandbox.errors import GatewayError, RefusedError, SandboxError, TlsError
from tool_sandbox.local import LocalGateway
from tool_sandbox.search.index import build_index
from trajectory.paths import WORD_PROBLEMS
from trajectory.records import write_jsonl

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class GatewayAccess:
    """How tool calls reach the sandbox."""

    address: str
    """Empty if there is a `directory`: only that knows the gateways, and the first may still be starting."""
    token: str | None = field(default=None, repr=False)
    tls: TlsFiles | None = None
    directory: str = ""
    """Name of the Ray actor that knows all gateways. Empty: there is only the one at `address`."""
    wait: Callable[[], None] = field(default=lambda: None, repr=False)
    """Blocks until tools can be called. Other slow parts can be started before it is called. Raises UserError."""

    @property
    def access(self) -> ToolAccess:
        """The same, as settings of actors."""
        return ToolAccess(
            sandbox_address=self.address,
            sandbox_token=SecretStr(self.token) if self.token else None,
            sandbox_tls=self.tls,
            sandbox_directory=self.directory,
        )


@contextmanager
def sandbox_session(config: RunConfig) -> Iterator[GatewayAccess]:
    """The run's gateway for the duration of the block: the one at `gateway`, or one that is started with `[sandbox]`."""
    if config.gateway is not None:
        yield gateway_that_is_there(config, config.gateway)
        return
    token = config.sandbox.token or None
    make_index(config.sandbox.search)
    try:
        local = LocalGateway(config.sandbox)
    except SandboxError as error:
        raise UserError(str(error)) from error
    with Supervisor(config.sandbox, local):
        yield GatewayAccess(local.address, token, config.sandbox.tls)


class Supervisor:
    """Starts a run's own gateway again at the same address whenever its process ends, until the block is left.

    Meanwhile tool calls wait (`actors.tools`). What can't be started stays down and is tried again: then episodes fail with
    the gateway's name, and the run ends by `sampling.failures` if that lasts.
    """

    def __init__(self, config: SandboxConfig, gateway: LocalGateway) -> None:
        self._config = config.model_copy(update={"address": gateway.address})
        self._gateway: LocalGateway | None = gateway
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gateway-supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()  # a start under way ends within `start_timeout_s`
        if self._gateway is not None:
            self._gateway.close()

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            if self._gateway is not None:
                if self._gateway.exit_code is None:
                    continue
                logger.warning("the sandbox gateway ended with code %s; it is started again", self._gateway.exit_code)
                self._gateway.close()
                self._gateway = None
            try:
                self._gateway = LocalGateway(self._config)
            except SandboxError as error:
                logger.warning("the sandbox gateway could not be started again: %s", error)


def gateway_that_is_there(config: RunConfig, address: str) -> GatewayAccess:
    """The gateway at `address`, asked once. UserError if it will never answer with the run's settings. A silent one may
    still start."""
    try:
        with SandboxClient(address, token=config.sandbox.token, tls=config.sandbox.tls) as client:
            client.stats()
    except (RefusedError, TlsError) as error:
        raise UserError(f"gateway: {error}") from None
    except GatewayError as error:
        logger.warning("gateway: it does not answer yet: %s", error)
    return GatewayAccess(address, config.sandbox.token or None, config.sandbox.tls)


def make_index(config: SearchConfig) -> None:
    """Make `sandbox.search.index` from `sandbox.search.corpus` if it doesn't exist. Raises UserError."""
    if not config.corpus or Path(config.index).exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(config.corpus)
        if config.corpus == WORD_PROBLEMS:
            corpus = Path(scratch, "corpus.jsonl")
            write_jsonl(corpus, word_problems_corpus.corpus())
        try:
            build_index(corpus, Path(config.index))
        except (ValueError, OSError) as error:
            raise UserError(f"sandbox.search.corpus: {error}") from error
