"""The slots of the containers in service: which are free, which client holds each of the others, and the queue for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tool_sandbox.admission import FairQueue, retry_after_s
from tool_sandbox.container import Container
from tool_sandbox.second_look import SHORT_GRACE_S, second_look

Slot = tuple[Container, int]

SMOOTHING = 0.05
"""Weight of the newest call in the mean execution time."""


class NoSlotError(Exception):
    """This call gets no slot: too many wait, it waited too long, or the pool closed. The text says which."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Slots:
    """The slots of all containers. Make it and use it inside one event loop. After `open`, slots can be acquired."""

    def __init__(self, max_queue: int, make_room: Callable[[int], None]) -> None:
        """`make_room(n)` is called when n calls wait and every slot is taken, so that idle sessions can be closed."""
        self._queue: FairQueue[asyncio.Future[Slot]] = FairQueue(max_queue)
        self._make_room = make_room
        self._serving: list[Container] = []
        self._holders: dict[Slot, str] = {}  # slots in use, and the client that each was given to
        self._mean_call_s = 1.0
        self._closed = False

    # --- what there is --------------------------------------------------------------------------------------------

    def open(self, container: Container) -> None:
        """Send calls to `container` from now on."""
        self._serving.append(container)
        self.dispatch()

    def retire(self, container: Container) -> None:
        """Send no new calls to `container`. Calls that hold a slot there keep it."""
        if container in self._serving:
            self._serving.remove(container)

    def gone(self, container: Container) -> None:
        """Forget `container`, which died, and the slots that were held there."""
        self.retire(container)
        for slot in [slot for slot in self._holders if slot[0] is container]:
            self._release(slot)
        self.dispatch()

    def freed(self, slot: Slot) -> None:
        """Note that the runner reported `slot` as clean again."""
        self._release(slot)
        self.dispatch()

    def serves(self, container: Container) -> bool:
        return container in self._serving

    def num_held(self, container: Container) -> int:
        return sum(held is container for held, _ in self._holders)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_clients(self) -> int:
        return self._queue.num_clients

    @property
    def num_free(self) -> int:
        return sum(len(container.free) for container in self._serving)

    @property
    def num_taken(self) -> int:
        return len(self._holders)

    # --- who gets it ----------------------------------------------------------------------------------------------

    async def acquire(self, client: str, timeout_s: float) -> Slot:
        """Wait for a clean slot. NoSlotError if too many calls wait already, or after `timeout_s`."""
        if self._closed:
            raise self.no_slot("the gateway is stopping")
        free = self._take_free(client)
        if free is not None:
            return free
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        leaves = self._queue.push(client, future)
        if leaves is future:
            raise self.no_slot(f"{len(self._queue)} calls wait for a slot already (sandbox.max_queue)")
        if leaves is not None:
            message = "the queue is full (sandbox.max_queue), and other clients wait with fewer calls than this one"
            leaves.set_exception(self.no_slot(message))
        self.dispatch()
        try:
            async with second_look(timeout_s, SHORT_GRACE_S):
                return await asyncio.shield(future)
        except (TimeoutError, asyncio.CancelledError) as error:
            if not future.done():
                self._queue.remove(client, future)
                future.cancel()
            elif future.exception() is None:  # it got a slot at the last moment: give it back
                self.give_back(future.result())
            if isinstance(error, TimeoutError):
                raise self.no_slot(
                    f"the call waited {max(timeout_s, 0.0):.1f} s for a slot of {len(self._serving)} containers, "
                    f"as did {len(self._queue)} others"
                ) from None
            raise

    def hold(self, slot: Slot) -> None:
        """Note that the gateway itself took `slot` from the container's free ones."""
        self._queue.take("")
        self._holders[slot] = ""

    def give_back(self, slot: Slot) -> None:
        """Return a slot that was not used."""
        container, number = slot
        container.free.add(number)
        self._release(slot)
        self.dispatch()

    def dispatch(self) -> None:
        """Give free slots to calls that wait."""
        while len(self._queue) and (container := self._roomiest()) is not None:
            client, future = self._queue.pop()
            slot = (container, container.free.pop())
            self._holders[slot] = client
            future.set_result(slot)
        num_short = len(self._queue) - sum(len(container.closing) for container in self._serving)
        if num_short > 0:
            self._make_room(num_short)

    def no_slot(self, message: str) -> NoSlotError:
        return NoSlotError(message, self.retry_after_s())

    def retry_after_s(self) -> float:
        num_slots = self.num_free + sum(self.num_held(container) for container in self._serving)
        return retry_after_s(len(self._queue), num_slots, self._mean_call_s)

    def ran(self, duration_s: float) -> None:
        """Note how long a call ran, seconds. The time after which refused clients should try again depends on it."""
        self._mean_call_s += SMOOTHING * (duration_s - self._mean_call_s)

    def close(self) -> None:
        """Refuse all calls that wait, and all later ones."""
        self._closed = True
        for future in self._queue.clear():
            future.set_exception(self.no_slot("the gateway is stopping"))

    def _take_free(self, client: str) -> Slot | None:
        """A free slot at once, if there is one. While calls wait there is none, since `dispatch` gives all away."""
        container = self._roomiest()
        if container is None:
            return None
        slot = (container, container.free.pop())
        self._queue.take(client)
        self._holders[slot] = client
        return slot

    def _roomiest(self) -> Container | None:
        """The container with the most free slots; None if there is no free slot."""
        container = max(self._serving, key=lambda c: len(c.free), default=None)
        return container if container is not None and container.free else None

    def _release(self, slot: Slot) -> None:
        client = self._holders.pop(slot, None)
        if client is not None:
            self._queue.release(client)
