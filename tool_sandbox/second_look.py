"""A deadline that is looked at twice, for whoever may have been stopped meanwhile.

A process that was stopped (SIGSTOP, a suspended laptop, a paused virtual machine) wakes with all its deadlines passed, and
its timers run before it has read what came. Who kills for a missed deadline would then kill the healthy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

GRACE_S = 2.0
"""From the first look at a deadline that has passed to the second: time to read what is there, and to answer."""
SHORT_GRACE_S = 0.1
"""To read what is there, for waits that somebody else's deadline bounds too."""


@contextlib.asynccontextmanager
async def second_look(timeout_s: float, grace_s: float = GRACE_S) -> AsyncIterator[None]:
    """As `asyncio.timeout`, with `grace_s` more when the deadline is found to have passed. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        first = loop.call_later(max(timeout_s, 0.0), lambda: timeout.reschedule(loop.time() + grace_s))
        try:
            yield
        finally:
            first.cancel()
