"""A deadline that is checked twice, for processes that may have been stopped meanwhile.

A process that was stopped (SIGSTOP, a suspended laptop, a paused virtual machine) wakes with all its deadlines passed, and
its timers run before it has read what arrived. If it killed for a missed deadline, it would kill processes that are healthy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

GRACE_S = 2.0
"""Seconds between the first and the second check of a deadline that has passed: time to read what is there and to answer."""
SHORT_GRACE_S = 0.1
"""Seconds to read what is there, for waits that another deadline bounds too."""


@contextlib.asynccontextmanager
async def second_look(timeout_s: float, grace_s: float = GRACE_S) -> AsyncIterator[None]:
    """Like `asyncio.timeout`, with `grace_s` more once the deadline is found to have passed. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        first = loop.call_later(max(timeout_s, 0.0), lambda: timeout.reschedule(loop.time() + grace_s))
        try:
            yield
        finally:
            first.cancel()
