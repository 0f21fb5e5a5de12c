"""Simulates a gateway as a queueing network, event by event. Pure: it computes latencies from costs and measures nothing.

    arrival ─▶ client ─▶ gateway ─▶ a free slot ─▶ its container ─▶ the code ─▶ container ─▶ gateway ─▶ client ─▶ done
              (one thread) (one event loop)       (forks serially)  (any core)   slot free

The client, the gateway and each container do one thing at a time, in the order of arrival. For it they need a core, as does
the code. The client and the gateway, which sleep in between, get a core first. Code, which has a higher niceness, gets one
for a quantum if nothing else needs it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

QUANTUM_S, QUANTA = 0.004, 4
"""The longest that code keeps a core while other code waits for one: so long, or that part of its mean if it is more."""


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU seconds of one call."""

    gateway_s: float = 0.0
    container_s: float = 0.0  # of the runner and its zygotes, which is serial in a container
    code_s: float = 0.0  # of the forked child and of what moves its bytes; the mean of an exponential distribution
    client_s: float = 0.0  # 0: clients are on other machines


@dataclass(frozen=True, slots=True)
class Node:
    cores: int
    containers: int
    slots: int  # of a container


@dataclass(slots=True)
class SimulationResult:
    """`latencies_s` from a call's arrival to its end, of the calls after the warm-up; shares of time are of the whole."""

    latencies_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)  # by part: CPU seconds used

    def rate(self) -> float:
        return len(self.latencies_s) / self.seconds if self.seconds else 0.0


@dataclass(slots=True, eq=False)
class _Server:
    """A part that does one thing at a time."""

    name: str
    busy: bool = False
    waiting: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)


class Simulation:
    """`run_open` or `run_closed`, once."""

    def __init__(self, node: Node, costs: Costs, seed: int = 0) -> None:
        self._costs = costs
        self._rng = random.Random(seed)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._free_cores = node.cores
        self._first: deque[tuple[float, Callable[[], None]]] = deque()  # wait for a core
        self._niced: deque[tuple[float, Callable[[], None]]] = deque()
        self._client, self._gateway = _Server("client"), _Server("gateway")
        self._containers = [_Server("containers") for _ in range(node.containers)]
        self._free_slots = [node.slots] * node.containers
        self._wait_slot: deque[Callable[[int], None]] = deque()
        self._outcome = SimulationResult(busy_s={"client": 0.0, "gateway": 0.0, "containers": 0.0, "code": 0.0})

    def run_open(self, arrivals_per_s: float, num_calls: int, warm_up: int = 0) -> SimulationResult:
        """Calls come as a Poisson process, however many wait."""
        left = iter(range(num_calls))

        def arrive() -> None:
            if (number := next(left, None)) is None:
                return
            begun = self._now
            self._call(lambda: self._end(begun, number >= warm_up))
            self._at(self._rng.expovariate(arrivals_per_s), arrive)

        self._at(0.0, arrive)
        return self._run()

    def run_closed(self, callers: int, num_calls: int, warm_up: int = 0) -> SimulationResult:
        """Each caller makes its next call when the last was answered."""
        left = iter(range(num_calls))

        def next_call() -> None:
            if (number := next(left, None)) is None:
                return
            begun = self._now

            def end() -> None:
                self._end(begun, number >= warm_up)
                next_call()

            self._call(end)

        for _ in range(callers):
            self._at(0.0, next_call)
        return self._run()

    def _run(self) -> SimulationResult:
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            event()
        self._outcome.seconds = self._now
        return self._outcome

    def _at(self, delay_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + delay_s, next(self._order), event))

    def _end(self, begun: float, counts: bool) -> None:
        if counts:
            self._outcome.latencies_s.append(self._now - begun)

    # --- a call -------------------------------------------------------------------------------------------------------

    def _call(self, done: Callable[[], None]) -> None:
        costs = self._costs
        code_s = self._rng.expovariate(1 / costs.code_s) if costs.code_s else 0.0

        def in_slot(place: int) -> None:
            container = self._containers[place]

            def ran() -> None:
                self._serve(container, costs.container_s / 2, answered)

            def answered() -> None:
                self._free_slot(place)
                self._serve(
                    self._gateway, costs.gateway_s / 2, lambda: self._serve(self._client, costs.client_s / 2, done)
                )

            self._serve(container, costs.container_s / 2, lambda: self._code(code_s, ran))

        def arrived() -> None:
            self._take_slot(in_slot)

        self._serve(self._client, costs.client_s / 2, lambda: self._serve(self._gateway, costs.gateway_s / 2, arrived))

    def _take_slot(self, use: Callable[[int], None]) -> None:
        place = max(range(len(self._free_slots)), key=self._free_slots.__getitem__)  # the roomiest, as the pool does
        if self._free_slots[place] == 0:
            self._wait_slot.append(use)
            return
        self._free_slots[place] -= 1
        use(place)

    def _free_slot(self, place: int) -> None:
        if self._wait_slot:
            self._wait_slot.popleft()(place)
        else:
            self._free_slots[place] += 1

    # --- who works ----------------------------------------------------------------------------------------------------

    def _serve(self, server: _Server, seconds: float, then: Callable[[], None]) -> None:
        if seconds == 0.0:
            then()
            return
        server.waiting.append((seconds, then))
        if not server.busy:
            self._next(server)

    def _next(self, server: _Server) -> None:
        if not server.waiting:
            server.busy = False
            return
        server.busy = True
        seconds, then = server.waiting.popleft()
        self._outcome.busy_s[server.name] += seconds

        def served() -> None:
            then()
            self._next(server)

        (self._first.append if server.name == "containers" else self._first.appendleft)((seconds, served))
        self._hand_out()

    def _code(self, seconds: float, then: Callable[[], None]) -> None:
        if seconds <= 0.0:
            then()
            return
        quantum = min(seconds, max(QUANTUM_S, self._costs.code_s / QUANTA))
        self._outcome.busy_s["code"] += quantum
        self._niced.append((quantum, lambda: self._code(seconds - quantum, then)))
        self._hand_out()

    def _hand_out(self) -> None:
        """Gives free cores to those that wait."""
        while self._free_cores and (self._first or self._niced):
            seconds, then = (self._first or self._niced).popleft()
            self._free_cores -= 1

            def release(then: Callable[[], None] = then) -> None:
                self._free_cores += 1
                then()
                self._hand_out()

            self._at(seconds, release)
