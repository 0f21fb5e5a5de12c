"""Decides which client gets the next free slot, and what refused calls are answered. Pure rules: no clock and no lock.

    call ──▶ queue of its client ─┐
    call ──▶ queue of its client ─┼──▶ the client that holds the fewest slots; of those, the one served longest ago
    call ──▶ queue of its client ─┘

The queues together are bounded. When they are full, a new call replaces the newest call of the longest queue, if that queue
is longer than the new call's own would be. So one client can fill the queue, but it can't keep the others out of it.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, TypeVar

T = TypeVar("T")

REPLY_MARGIN_S = 2.5
"""Seconds of a client's deadline in which its call may not queue: they are for the kill, and for a large reply when the
machine is busy."""
RUN_SHARE, QUEUE_SHARE = 0.8, 0.1
"""Shares of a client's deadline: the most that execution may take, and the least that is left for queueing. A call that is
killed in time can still return its partial output, and a call can wait for a slot that is being cleaned."""
MIN_RETRY_S, MAX_RETRY_S = 0.1, 30.0


class FairQueue(Generic[T]):
    """Holds the calls that wait, by client, and counts the slots that each client holds."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._lines: dict[str, deque[T]] = {}  # only clients that wait: no queue in it is empty
        self._held: Counter[str] = Counter()
        self._last_served: dict[str, int] = {}  # only clients that wait for a slot or hold one
        self._num_served = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_clients(self) -> int:
        """Number of clients that wait for a slot or hold one."""
        return len(self._lines.keys() | self._held.keys())

    def push(self, client: str, item: T) -> T | None:
        """Add `item` to the queue of `client`. Returns the call that must leave: None, the newest call of a longer queue,
        or `item` itself."""
        leaves: T | None = None
        if self._num_waiting >= self._max_waiting:
            longest = max(self._lines, key=lambda name: len(self._lines[name]), default=client)
            if len(self._lines.get(longest, ())) <= len(self._lines.get(client, ())) + 1:
                return item
            leaves = self._lines[longest].pop()
            self._num_waiting -= 1
        self._lines.setdefault(client, deque()).append(item)
        self._num_waiting += 1
        return leaves

    def pop(self) -> tuple[str, T]:
        """Remove and return the next call, and its client, which is counted as holding one slot more. IndexError if no
        call waits."""
        if not self._lines:
            raise IndexError("nobody waits")
        client = min(self._lines, key=lambda name: (self._held[name], self._last_served.get(name, 0)))
        item = self._lines[client].popleft()
        self._num_waiting -= 1
        self.take(client)
        self._tidy(client)
        return client, item

    def take(self, client: str) -> None:
        """Count one slot more for `client`, which found one free while no call waited."""
        self._num_served += 1
        self._last_served[client] = self._num_served
        self._held[client] += 1

    def release(self, client: str) -> None:
        """Count one slot less for `client`."""
        self._held[client] -= 1
        self._tidy(client)

    def remove(self, client: str, item: T) -> None:
        """Remove `item` from the queue. ValueError if it isn't there."""
        if client not in self._lines:
            raise ValueError("it does not wait")
        self._lines[client].remove(item)
        self._num_waiting -= 1
        self._tidy(client)

    def clear(self) -> list[T]:
        """Empty the queue and return all calls that waited."""
        items = [item for line in self._lines.values() for item in line]
        for client in list(self._lines):
            self._lines[client].clear()
            self._tidy(client)
        self._num_waiting = 0
        return items

    def _tidy(self, client: str) -> None:
        """Remove entries that are zero, since clients come and go and their names must not pile up."""
        if not self._lines.get(client):
            self._lines.pop(client, None)
        if self._held[client] <= 0:
            del self._held[client]
            if client not in self._lines:
                self._last_served.pop(client, None)


def retry_after_s(num_waiting: int, num_slots: int, mean_call_s: float) -> float:
    """Seconds after which a refused client should try again: by then, those who wait and one more have had a slot each."""
    wait_s = (num_waiting + 1) * mean_call_s / max(num_slots, 1)
    return min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)


def split_deadline(left_s: float | None, timeout_s: float, queue_timeout_s: float) -> tuple[float, float]:
    """Splits what is left of the client's deadline (None: there is none) into (longest wait, longest execution), seconds.

    Both together end before the client stops listening."""
    if left_s is None:
        return queue_timeout_s, timeout_s
    left_s = max(left_s, 0.0)
    queue_s = min(queue_timeout_s, max(left_s - timeout_s - REPLY_MARGIN_S, QUEUE_SHARE * left_s))
    return queue_s, min(timeout_s, RUN_SHARE * left_s)
