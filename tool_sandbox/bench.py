"""Measures how fast the sandbox is on this machine, beside other ways to run one call.

Latencies are measured at the caller, in milliseconds. The other ways share no code with the sandbox; they give the ratios.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tool_sandbox import build
from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.container import Container
from tool_sandbox.errors import GatewayError, RunnerError
from tool_sandbox.launcher import Launcher
from tool_sandbox.local import LocalGateway

PRINT = "print(2 + 2)"
SYMPY = "import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - 5*x + 6))"
EXPECTED = {PRINT: "4\n", SYMPY: "[2, 3]\n"}
CALL_TIMEOUT_S = 60.0
PACED_SHARE = 0.5
"""Share of the calls/s that 32 callers reach without pauses. At this load a high p99 is a slow call and not a queue."""
TURN_S = 0.5
PACED_SECONDS_TIMES = 3
"""A p99 needs more calls than a median does."""

Way = Callable[[str], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of the table."""

    way: str
    code: str
    concurrency: int
    p50_ms: float
    p99_ms: float
    calls_per_s: float
    num_calls: int


def percentile(values: list[float], q: float) -> float:
    """The smallest of `values` that at least the share `q` of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1)]


async def time_calls(name: str, way: Way, code: str, concurrency: int, seconds: float) -> BenchRow:
    """Measures `concurrency` callers for `seconds`; each makes one call after another. RunnerError if an output is wrong."""
    (row,) = await measure_in_turns({name: way}, code, concurrency, seconds, seconds)
    return row


async def measure_in_turns(
    ways: dict[str, Way], code: str, concurrency: int, seconds: float, turn_s: float = TURN_S
) -> list[BenchRow]:
    """Like `time_calls`, but in turns of `turn_s` for each way, so that a slow phase of the machine slows all ways."""
    latencies: dict[str, list[float]] = {name: [] for name in ways}
    spent = dict.fromkeys(ways, 0.0)

    async def caller(name: str, until: float) -> None:
        while (begun := time.monotonic()) < until:
            output = await ways[name](code)
            latencies[name].append(1000 * (time.monotonic() - begun))
            if output != EXPECTED[code]:
                raise RunnerError(f"{name} printed {output!r} instead of {EXPECTED[code]!r}")

    while min(spent.values()) < seconds:
        for name in ways:
            started = time.monotonic()
            await asyncio.gather(*(caller(name, started + turn_s) for _ in range(concurrency)))
            spent[name] += time.monotonic() - started
    return [_row(name, code, concurrency, latencies[name], spent[name]) for name in ways]


def _row(name: str, code: str, concurrency: int, latencies: list[float], seconds: float) -> BenchRow:
    label, rate = "print" if code == PRINT else "sympy", len(latencies) / seconds
    return BenchRow(
        name, label, concurrency, percentile(latencies, 0.5), percentile(latencies, 0.99), rate, len(latencies)
    )


async def measure_paced(
    name: str, way: Way, code: str, concurrency: int, seconds: float, calls_per_s: float
) -> BenchRow:
    """Like `time_calls`, with callers that pause between calls. The pauses follow an exponential distribution, so that all
    callers together make `calls_per_s`; they make fewer if the calls themselves take long."""
    rng = random.Random(0)
    think_s = concurrency / calls_per_s

    latencies: list[float] = []
    started = time.monotonic()

    async def caller() -> None:
        while True:
            await asyncio.sleep(rng.expovariate(1 / think_s))
            begun = time.monotonic()
            if begun - started > seconds:
                return
            output = await way(code)
            latencies.append(1000 * (time.monotonic() - begun))
            if output != EXPECTED[code]:
                raise RunnerError(f"{name} printed {output!r} instead of {EXPECTED[code]!r}")

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return _row(name, code, concurrency, latencies, seconds)


async def bare(code: str) -> str:
    """Runs `python -c` without any sandbox, with the packages of this interpreter."""
    return await _run(sys.executable, "-c", code)


async def _run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise RunnerError(f"{command[0]} did not end within {CALL_TIMEOUT_S:.0f} s") from None
    if process.returncode != 0:
        raise RunnerError(f"{' '.join(command[:3])} failed: {errors.decode('utf-8', 'replace')[-300:]}")
    return output.decode()


@asynccontextmanager
async def runner_alone(config: SandboxConfig) -> AsyncIterator[Way]:
    """Runs calls in one container without pool, gateway and gRPC, one at a time. Like the pool, it waits until the slot is
    clean."""
    freed = asyncio.Event()
    launcher = Launcher(config)
    launcher.spawn()
    container = Container(launcher, config, lambda container, slot: freed.set())
    slots = itertools.cycle(range(config.slots_per_container))

    async def call(code: str) -> str:
        slot = next(slots)
        while slot not in container.free:
            freed.clear()
            await freed.wait()
        container.free.remove(slot)
        kind = "warm" if code == SYMPY else "cold"
        return (await container.call(slot, kind, code, CALL_TIMEOUT_S)).output

    try:
        await launcher.connect()
        await container.start()
        yield call
    finally:
        await container.stop()
        await launcher.close()


def wait_until_full(address: str, config: SandboxConfig, timeout_s: float) -> None:
    """Waits until every container and spare of the gateway is ready and none is starting, as that would distort the figures.

    Raises GatewayError if that takes longer."""
    wanted = {"serving": config.num_containers, "spare": config.num_spares, "starting": 0, "retiring": 0}
    deadline = time.monotonic() + timeout_s
    with SandboxClient(address, token=config.token, tls=config.tls) as client:
        while (there := client.stats(timeout_s).pool.containers) != wanted:
            if time.monotonic() > deadline:
                raise GatewayError(f"waited {timeout_s:.0f} s on the gateway's containers: {there}, wanted {wanted}")
            time.sleep(0.1)


async def table(config: SandboxConfig, seconds: float, report: Callable[[BenchRow], None]) -> list[BenchRow]:
    """Measures every row for `seconds` and passes each to `report` as soon as it is there. Errors: SandboxError."""
    rows: list[BenchRow] = []

    async def add(name: str, way: Way, code: str, concurrency: int) -> None:
        rows.append(await time_calls(name, way, code, concurrency, seconds))
        report(rows[-1])

    image = build.resolve_image(config)

    async def docker_run(code: str) -> str:
        return await _run("docker", "run", "--rm", "--network", "none", "--entrypoint", "python3", image, "-c", code)

    await add("docker run --rm a call", docker_run, PRINT, 1)
    for code in (PRINT, SYMPY):
        await add("bare python -c, no container", bare, code, 1)
    gateway = await asyncio.to_thread(LocalGateway, config)
    try:
        await asyncio.to_thread(wait_until_full, gateway.address, config, config.start_timeout_s)
        async with AsyncSandboxClient(gateway.address, token=config.token, tls=config.tls) as client:

            async def call(code: str, session_id: str | None = None) -> str:
                result = await client.call("python", code, timeout_s=config.max_timeout_s, session_id=session_id)
                return result.output if result.status != "unavailable" else f"{result.status}: {result.message}"

            async def compare(ways: dict[str, Way], concurrency: int, seconds: float, turn_s: float) -> None:
                for code in (PRINT, SYMPY):
                    for row in await measure_in_turns(ways, code, concurrency, seconds, turn_s):
                        rows.append(row)
                        report(row)

            async with runner_alone(config) as alone:
                await compare({"runner alone, no gateway": alone, "gateway, gRPC": call}, 1, seconds, TURN_S)
            # A turn ends with its last call, so a turn has to be long compared with a call.
            await compare({"bare python -c, no container": bare, "gateway, gRPC": call}, 8, 2 * seconds, seconds)
            for code in (PRINT, SYMPY):
                await add("gateway, gRPC", call, code, 32)
            for saturated in [row for row in rows if row.concurrency == 32]:
                code = PRINT if saturated.code == "print" else SYMPY
                name, rate = "gateway, gRPC, with pauses", PACED_SHARE * saturated.calls_per_s
                rows.append(await measure_paced(name, call, code, 32, PACED_SECONDS_TIMES * seconds, rate))
                report(rows[-1])
            await add("gateway, gRPC: a cell of a session", lambda code: call(code, "bench"), PRINT, 1)
    finally:
        await asyncio.to_thread(gateway.close)
    return rows


def render_row(row: BenchRow) -> str:
    """A line of a Markdown table."""
    return (
        f"| {row.way} | {row.code} | {row.concurrency} | {row.p50_ms:.1f} | {row.p99_ms:.1f} | "
        f"{row.calls_per_s:.1f} | {row.num_calls} |"
    )


HEADER = "| way | code | callers | p50 ms | p99 ms | calls/s | calls |\n|---|---|---|---|---|---|---|"


def ratios(rows: list[BenchRow]) -> list[str]:
    """The main results of the table, one line each."""
    paced = [row for row in rows if "pauses" in row.way]
    others = [row for row in rows if "cell" not in row.way and row not in paced]
    by = {(row.way.split(",")[0].split(":")[0], row.code, row.concurrency): row for row in others}
    (cell,) = (row for row in rows if "cell" in row.way)
    print_ratio = by["gateway", "print", 8].calls_per_s / by["bare python -c", "print", 8].calls_per_s
    sympy_ratio = by["gateway", "sympy", 8].calls_per_s / by["bare python -c", "sympy", 8].calls_per_s
    overhead_ms = by["gateway", "print", 1].p50_ms - by["runner alone", "print", 1].p50_ms
    return [
        f"print at 8 callers: {print_ratio:.2f} times bare python -c",
        f"sympy at 8 callers: {sympy_ratio:.1f} times bare python -c",
        f"gateway over the runner alone: {overhead_ms:.2f} ms p50",
        f"a session's cell: {cell.p50_ms:.2f} ms p50",
        *(
            f"{row.code} at 32 callers and {row.calls_per_s:.0f} calls/s: p99 {row.p99_ms / row.p50_ms:.1f} times p50"
            for row in paced
        ),
    ]
