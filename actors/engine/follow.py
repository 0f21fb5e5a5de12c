"""An actor ends soon after its engine: a fresh process is the one state that is known to be good."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable
from typing import TypeVar

from actors.engine.protocol import Engine, EngineDead

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_DELAY_S = 1.0
"""From the engine's death to the actor's: long enough for every call in flight to be answered with its cause."""


class EngineFollower:
    """Ends this process `EXIT_DELAY_S` after a look that finds `engine` dead; `name` is the actor's, for the log."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._ending = False

    async def result(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises EngineDead if the engine is dead by then.

        The episodes of a dead engine end at once, each with an error as data. If these were returned, they would count as
        failures of their tasks, and the actor would get the next tasks until its process ends.
        """
        try:
            result = await work
        finally:
            self.look()
        if cause := self._engine.cause_of_death:
            raise EngineDead(f"the engine is dead: {cause}")
        return result

    def look(self) -> None:
        """End this process soon if the engine is dead."""
        if self._engine.cause_of_death and not self._ending:
            self._ending = True
            logger.error("%s ends: the engine is dead: %s", self._name, self._engine.cause_of_death)
            asyncio.get_running_loop().call_later(EXIT_DELAY_S, os._exit, 1)

    def stop(self) -> None:
        """The actor shuts its engine down itself."""
        self._ending = True
