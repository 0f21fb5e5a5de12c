"""The simulation of a gateway's queues against results that are known: by hand, and from queueing theory."""

import statistics

import pytest

from benchmarks.sandbox_queue import Costs, Node, Simulation, SimulationResult


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_slot_is_an_m_d_1_queue(load: float) -> None:
    """One container of one slot that takes S a call: the mean wait is load * S / (2 * (1 - load))."""
    service_s = 0.01
    node = Node(cores=8, containers=1, slots=1)
    outcome = Simulation(node, Costs(container_s=service_s)).run_open(load / service_s, 60_000, warm_up=2000)
    wait_s = statistics.mean(outcome.latencies_s) - service_s
    assert wait_s == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.05)
    assert outcome.busy_s["containers"] == pytest.approx(60_000 * service_s)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_one_core_is_an_m_m_1_queue(load: float) -> None:
    """Code alone, of exponential length, on one core, shared by quanta: the mean time in the system is S / (1 - load)."""
    service_s = 0.01
    node = Node(cores=1, containers=1, slots=100_000)
    outcome = Simulation(node, Costs(code_s=service_s)).run_open(load / service_s, 60_000, warm_up=5000)
    assert statistics.mean(outcome.latencies_s) == pytest.approx(service_s / (1 - load), rel=0.05)


def closed(node: Node, costs: Costs, callers: int, num_calls: int) -> SimulationResult:
    return Simulation(node, costs).run_closed(callers, num_calls)


def test_three_callers_on_one_slot_by_hand() -> None:
    """A container that takes 2 s a call, serially, with one slot: the three first calls end at 2, 4 and 6 s, and each later
    one waits for two others."""
    outcome = closed(Node(cores=8, containers=1, slots=1), Costs(container_s=2.0), 3, 5)
    assert outcome.latencies_s == [2.0, 4.0, 6.0, 6.0, 6.0]
    assert outcome.seconds == 10.0
    assert outcome.rate() == 0.5


def test_two_containers_work_side_by_side_if_there_are_two_cores() -> None:
    costs = Costs(container_s=2.0)
    assert closed(Node(cores=2, containers=2, slots=1), costs, 2, 2).latencies_s == [2.0, 2.0]
    # On one core the halves of the two calls take turns.
    assert closed(Node(cores=1, containers=2, slots=1), costs, 2, 2).latencies_s == [3.0, 4.0]


def test_throughput_is_bounded_by_the_busiest_part() -> None:
    """At most 1 / gateway_s, containers / container_s, and cores / all CPU of a call."""
    many = Node(cores=64, containers=32, slots=4)
    assert closed(many, Costs(gateway_s=0.001, container_s=0.004), 500, 20_000).rate() == pytest.approx(1000, rel=0.02)
    few = Node(cores=64, containers=2, slots=4)
    assert closed(few, Costs(gateway_s=0.001, container_s=0.004), 500, 20_000).rate() == pytest.approx(500, rel=0.02)
    small = Node(cores=2, containers=32, slots=4)
    assert closed(small, Costs(gateway_s=0.001, container_s=0.003), 500, 20_000).rate() == pytest.approx(500, rel=0.02)
