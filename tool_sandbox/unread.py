"""Counts answers that their clients haven't read yet. They are bounded for each connection and for all connections."""

from __future__ import annotations

import ctypes
from collections import Counter

MAX_CONNECTION_BYTES = 16 * 1024 * 1024
"""Most unread bytes of one connection; above that its calls are refused and not run."""
MAX_TOTAL_BYTES = 64 * 1024 * 1024
"""Most unread bytes of all connections; above that, connections with more than an equal share of it are refused."""
TRIM_BYTES = 16 * 1024 * 1024
"""When the last of at least this many bytes has been read, their memory is given back to the machine."""


class Unread:
    """Counts bytes by connection, for one event loop."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()  # only connections with unread bytes
        self._total = self._peak = 0

    def refusal(self, connection: str) -> str:
        """The answer for a connection that reads its answers too slowly or not at all; empty if it may go on."""
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
        """Note that `size` bytes are being sent."""
        self._bytes[connection] += size
        self._total += size
        self._peak = max(self._peak, self._total)

    def remove(self, connection: str, size: int) -> None:
        """Note that they were sent, or never will be."""
        self._bytes[connection] -= size
        self._total -= size
        if self._bytes[connection] <= 0:
            del self._bytes[connection]
        if not self._bytes and self._peak > TRIM_BYTES:
            self._peak = 0
            if trim := getattr(
                ctypes.CDLL(None), "malloc_trim", None
            ):  # glibc's malloc, which otherwise keeps all memory that it once had
                trim(0)
