"""Answers that their clients haven't read yet: bounded for each connection, and for all of them together."""

from __future__ import annotations

import ctypes
from collections import Counter

MAX_CONNECTION_BYTES = 16 * 1024 * 1024
"""Of one connection; beyond that its calls are refused and not run."""
MAX_TOTAL_BYTES = 64 * 1024 * 1024
"""Of all; beyond that the connections that have more than an equal share of it are refused."""
TRIM_BYTES = 16 * 1024 * 1024
"""After so many at a time, what was used for them is given back to the machine when the last has been read."""


class Unread:
    """Counts bytes by connection. For one event loop."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()  # of connections with any
        self._total = self._peak = 0

    def refusal(self, connection: str) -> str:
        """What a connection hears that reads its answers too slowly or not at all; empty if it may go on."""
        size, limit = self._bytes[connection], MAX_CONNECTION_BYTES
        if self._total > MAX_TOTAL_BYTES:
            limit = min(limit, MAX_TOTAL_BYTES // len(self._bytes))
        if size <= limit:
            return ""
        return (
            f"the client has not read {size} bytes of earlier answers on this connection; the gateway keeps at most "
            f"{limit} now. Read the answers, or make fewer calls at once"
        )

    def add(self, connection: str, size: int) -> None:
        """`size` bytes are on their way."""
        self._bytes[connection] += size
        self._total += size
        self._peak = max(self._peak, self._total)

    def remove(self, connection: str, size: int) -> None:
        """They have left, or never will."""
        self._bytes[connection] -= size
        self._total -= size
        if self._bytes[connection] <= 0:
            del self._bytes[connection]
        if not self._bytes and self._peak > TRIM_BYTES:
            self._peak = 0
            if trim := getattr(
                ctypes.CDLL(None), "malloc_trim", None
            ):  # glibc's own; it would keep all that it once had
                trim(0)
