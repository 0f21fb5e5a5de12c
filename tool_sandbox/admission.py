"""Who gets the next slot, and what those hear who get none: rules without a clock or a lock.

    call ──▶ its client's line ─┐
    call ──▶ its client's line ─┼──▶ whoever holds the fewest slots; of those, whoever was served longest ago
    call ──▶ its client's line ─┘

The lines together are bounded. When they are full, a newcomer takes the place of the newest call in the longest line, if
that is longer than the newcomer's own would be: one client can fill the queue, it can't keep the others out of it.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, TypeVar

T = TypeVar("T")

REPLY_MARGIN_S = 2.5
"""Of a client's deadline, kept from queueing: the kill, and a large reply on a busy machine."""
RUN_SHARE, QUEUE_SHARE = 0.8, 0.1
"""Of a client's deadline, the most that execution gets and the least that queueing gets: who is killed in time still gets
its partial output, and a slot that is being cleaned can be waited for."""
MIN_RETRY_S, MAX_RETRY_S = 0.1, 30.0


class FairQueue(Generic[T]):
    """Calls that wait, by client, and how many slots each client holds."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._lines: dict[str, deque[T]] = {}  # of clients that wait; none is empty
        self._held: Counter[str] = Counter()
        self._last_served: dict[str, int] = {}  # of clients that wait or hold
        self._num_served = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_clients(self) -> int:
        """Clients that wait for a slot or hold one."""
        return len(self._lines.keys() | self._held.keys())

    def push(self, client: str, item: T) -> T | None:
        """`item` waits. Returns who must leave for it: nobody (None), the newest of a longer line, or `item` itself."""
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
        """The next to be served, and its client, who holds one slot more from now on. IndexError if nobody waits."""
        if not self._lines:
            raise IndexError("nobody waits")
        client = min(self._lines, key=lambda name: (self._held[name], self._last_served.get(name, 0)))
        item = self._lines[client].popleft()
        self._num_waiting -= 1
        self.take(client)
        self._tidy(client)
        return client, item

    def take(self, client: str) -> None:
        """`client` holds one slot more: it found one free, and nobody waited."""
        self._num_served += 1
        self._last_served[client] = self._num_served
        self._held[client] += 1

    def release(self, client: str) -> None:
        """`client` holds one slot less."""
        self._held[client] -= 1
        self._tidy(client)

    def remove(self, client: str, item: T) -> None:
        """`item` waits no longer. ValueError if it didn't."""
        if client not in self._lines:
            raise ValueError("it does not wait")
        self._lines[client].remove(item)
        self._num_waiting -= 1
        self._tidy(client)

    def clear(self) -> list[T]:
        """All that waited; nobody does now."""
        items = [item for line in self._lines.values() for item in line]
        for client in list(self._lines):
            self._lines[client].clear()
            self._tidy(client)
        self._num_waiting = 0
        return items

    def _tidy(self, client: str) -> None:
        """Forget what is zero: clients come and go, their names must not pile up."""
        if not self._lines.get(client):
            self._lines.pop(client, None)
        if self._held[client] <= 0:
            del self._held[client]
            if client not in self._lines:
                self._last_served.pop(client, None)


def retry_after_s(num_waiting: int, num_slots: int, mean_call_s: float) -> float:
    """When to come again: the time in which those who wait now, and one more, will have had a slot each."""
    wait_s = (num_waiting + 1) * mean_call_s / max(num_slots, 1)
    return min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)


def split_deadline(left_s: float | None, timeout_s: float, queue_timeout_s: float) -> tuple[float, float]:
    """What a call may wait and how long it may run, of what its client's deadline leaves (None: it has none).

    Both together end before the client stops listening."""
    if left_s is None:
        return queue_timeout_s, timeout_s
    left_s = max(left_s, 0.0)
    queue_s = min(queue_timeout_s, max(left_s - timeout_s - REPLY_MARGIN_S, QUEUE_SHARE * left_s))
    return queue_s, min(timeout_s, RUN_SHARE * left_s)
