"""How many trajectories a node serves. Costs are measured on this machine, a simulation is compared with measurements on it,
and then the same simulation is made of a larger node.

python -m benchmarks.sandbox_capacity --seconds 20 --out capacity.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sandbox_load import draw
from benchmarks.sandbox_queue import Costs, Node, Simulation
from tool_sandbox.bench import percentile
from tool_sandbox.client import AsyncSandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import LocalGateway

CALLS_PER_S = 0.2
"""Calls of one trajectory."""
MAX_P99_S = 1.0
"""A node is full when a hundredth of its calls take longer than this and the code itself."""
SETTLE_S = 3.0
NUM_CALLS = 40_000
"""The number of calls in one simulation."""
OTHER_COSTS_S = (0.0, 0.1, 1.0)
"""CPU seconds that code takes beyond that of the measured mix."""


def cpu_s(processes: list[psutil.Process], *, children: bool = False) -> float:
    """CPU seconds of `processes`, or of the children that they have reaped."""
    times = [process.cpu_times() for process in processes]
    return float(sum(t.children_user + t.children_system if children else t.user + t.system for t in times))


def machine_busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def in_containers(gateway: LocalGateway) -> list[psutil.Process]:
    """The runners and zygotes. There are no other processes if no call runs and none is being cleaned up."""
    time.sleep(SETTLE_S)
    names = _docker("ps", "--filter", f"name=autotraj-{gateway.pid}-", "--format", "{{.Names}}").split()
    pids = [int(line) for name in names for line in _docker("top", name, "-o", "pid").splitlines()[1:]]
    return [psutil.Process(pid) for pid in pids]


def _docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


async def load(address: str, callers: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of calls one after another from each of `callers`, and the seconds it took."""
    latencies: list[float] = []
    rng, started, number = random.Random(0), time.monotonic(), 0
    async with AsyncSandboxClient(address) as client:

        async def caller() -> None:
            nonlocal number
            while time.monotonic() - started < seconds:
                number += 1
                call = draw(rng, number, 0.0)
                begun = time.monotonic()
                # No sessions: a session's cell costs less, and a trajectory has few of either.
                result = await client.call("python", call.code, timeout_s=call.timeout_s)
                latencies.append(time.monotonic() - begun)
                if complaint := call.wrong(result):
                    raise RuntimeError(complaint)

        await asyncio.gather(*(caller() for _ in range(callers)))
    return latencies, time.monotonic() - started


def measure(gateway: LocalGateway, inside: list[psutil.Process], callers: int, seconds: float) -> dict[str, Any]:
    """Costs of a call and what the callers saw, and how much of the machine others took meanwhile."""
    us, engine = psutil.Process(), psutil.Process(gateway.pid)
    # `docker run`, through which a container's input and output go on their way to the engine.
    movers = [process for process in engine.children(recursive=True) if process.name() == "docker"]

    def now() -> tuple[float, ...]:
        busy = machine_busy_s()
        return (cpu_s([engine]), cpu_s(inside), cpu_s(inside, children=True), cpu_s(movers), cpu_s([us]), busy)

    before = now()
    latencies, took_s = asyncio.run(load(gateway.address, callers, seconds))
    gateway_s, container_s, code_s, mover_s, client_s, busy_s = (
        (b - a) / len(latencies) for a, b in zip(before, now(), strict=True)
    )
    costs = Costs(gateway_s=gateway_s, container_s=container_s, code_s=code_s + mover_s, client_s=client_s)
    ours_s = sum(asdict(costs).values())
    return {
        "costs": costs,
        "calls_per_s": len(latencies) / took_s,
        "p50_s": percentile(latencies, 0.5),
        "p99_s": percentile(latencies, 0.99),
        # The engine's own daemons are among the others: their time can't be told from other users' of the same engine.
        "others": (busy_s - ours_s) * len(latencies) / (took_s * (psutil.cpu_count() or 1)),
    }


def slower(costs: Costs, factor: float) -> Costs:
    return Costs(**{name: value * factor for name, value in asdict(costs).items()})


def capacity(node: Node, costs: Costs, max_p99_s: float) -> tuple[int, dict[str, float]]:
    """The most trajectories at which the 99th percentile stays below `max_p99_s`, to a hundredth, and how busy each part is
    then (of what it has: a gateway of one core, the node of all of its cores)."""

    def simulate(trajectories: int) -> tuple[float, dict[str, float]]:
        outcome = Simulation(node, costs).run_open(trajectories * CALLS_PER_S, NUM_CALLS, warm_up=NUM_CALLS // 5)
        all_s = sum(outcome.busy_s.values())
        shares = {
            "gateway": outcome.busy_s["gateway"] / outcome.seconds,
            "containers": outcome.busy_s["containers"] / outcome.seconds / node.containers,
            "cores": all_s / outcome.seconds / node.cores,
        }
        return percentile(outcome.latencies_s, 0.99), shares

    # No queue is bounded above what its busiest part can do.
    low, high = 1, int(min(1 / costs.gateway_s, node.cores / sum(asdict(costs).values())) / CALLS_PER_S) + 1
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if simulate(middle)[0] <= max_p99_s else (low, middle)
    return low, simulate(low)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--cores", type=int, default=64)
    parser.add_argument("--containers", type=int, default=32)
    parser.add_argument("--out", default="", help="write the figures there, as JSON")
    args = parser.parse_args()
    config = SandboxConfig(num_spares=0, memory_mib=256, scratch_mib=16)
    here = Node(cores=psutil.cpu_count() or 1, containers=config.num_containers, slots=config.slots_per_container)
    figures: dict[str, Any] = {"here": asdict(here), "checks": [], "capacity": []}
    print("| callers | | calls/s | p50 ms | p99 ms | others' share of the machine |\n|---|---|---|---|---|---|")
    with LocalGateway(config) as gateway:
        asyncio.run(load(gateway.address, 8, 3.0))
        inside = in_containers(gateway)
        measured = {callers: measure(gateway, inside, callers, args.seconds) for callers in (2, 8, 32)}
    costs: Costs = measured[8]["costs"]  # for all: it is the costs that must explain the other loads
    for callers, seen in measured.items():
        # Other users' load makes the machine slower for this measurement.
        simulation = Simulation(here, slower(costs, 1 / (1 - min(seen["others"], 0.95))))
        outcome = simulation.run_closed(callers, 20_000, warm_up=1000)
        p50_s, p99_s = percentile(outcome.latencies_s, 0.5), percentile(outcome.latencies_s, 0.99)
        for what, rate, p50, p99 in (
            ("measured", seen["calls_per_s"], seen["p50_s"], seen["p99_s"]),
            ("simulated", outcome.rate(), p50_s, p99_s),
        ):
            print(f"| {callers} | {what} | {rate:.0f} | {1000 * p50:.1f} | {1000 * p99:.1f} | {seen['others']:.0%} |")
            figures["checks"].append(
                {"callers": callers, "what": what, "calls_per_s": rate, "p50_s": p50, "p99_s": p99}
            )
    print(
        "\nCPU of a call, ms: " + ", ".join(f"{n.removesuffix('_s')} {1000 * v:.2f}" for n, v in asdict(costs).items())
    )
    figures["costs"] = asdict(costs)
    node = Node(cores=args.cores, containers=args.containers, slots=config.slots_per_container)
    print(f"\n{node.cores} cores, {node.containers} containers of {node.slots} slots, clients on other machines:\n")
    print(
        "| more CPU of the code | trajectories | gateway busy | a container's runner | cores |\n|---|---|---|---|---|"
    )
    for more_s in OTHER_COSTS_S:
        large = replace(costs, client_s=0.0, code_s=costs.code_s + more_s)
        alone_s = 4.6 * large.code_s  # the 99th percentile of the code itself, which nobody can bound
        number, shares = capacity(node, large, MAX_P99_S + alone_s)
        print(f"| {more_s:g} s | {number} | " + " | ".join(f"{share:.0%}" for share in shares.values()) + " |")
        figures["capacity"].append({"more_s": more_s, "trajectories": number, **shares})
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
