"""Kills containers under load. Every call must get an explicit status, and throughput must come back.

python -m benchmarks.sandbox_recovery --seconds 60 --out recovery.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path

from tool_sandbox.client import AsyncSandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import LocalGateway

WINDOW_S = 0.5
BACK_SHARE = 0.8
"""Throughput is back when a window reaches this share of the median window of those without a kill: all before the first,
and the last of each pause between two."""
QUIET_S = 2.0
"""That last part of a pause."""


def seconds_until_back(ends: list[float], killed_at: float, until: float, normal: float) -> float:
    """From a kill to the end of the first window of `WINDOW_S` with its share of the normal rate; `until` at most."""
    start = killed_at
    while start + WINDOW_S <= until:
        rate = sum(start <= end < start + WINDOW_S for end in ends) / WINDOW_S
        if start > killed_at and rate >= BACK_SHARE * normal:
            return start + WINDOW_S - killed_at
        start += WINDOW_S / 5
    return until - killed_at


def windows_without_a_kill(ends: list[float], kills: list[float]) -> list[float]:
    """Rates of the windows from a second after the start to the first kill, and of the `QUIET_S` before each other one."""
    starts = [1.0 + WINDOW_S * step for step in range(int((kills[0] - 1.0) / WINDOW_S))]
    for killed_at in kills[1:]:
        starts += [killed_at - QUIET_S + WINDOW_S * step for step in range(int(QUIET_S / WINDOW_S))]
    return [sum(start <= end < start + WINDOW_S for end in ends) / WINDOW_S for start in starts]


async def run(gateway: LocalGateway, seconds: float, every_s: float, concurrency: int) -> dict[str, object]:
    ends: list[float] = []
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    kills: list[float] = []
    started = time.monotonic()
    num_sent = 0
    rng = random.Random(0)

    async def one_after_another(client: AsyncSandboxClient, name: int) -> None:
        nonlocal num_sent
        while time.monotonic() - started < seconds:
            num_sent += 1
            result = await client.call("python", f"print({name})", timeout_s=20)
            statuses[result.status] += 1
            if result.status == "ok" and result.output == f"{name}\n":
                ends.append(time.monotonic() - started)
            elif result.status != "unavailable":
                wrong.append(f"{result.status}: {result.output[:80]}{result.message}")
            else:
                await asyncio.sleep(min(result.retry_after_s or 0.1, 1.0))

    async def kill() -> None:
        await asyncio.sleep(2 * every_s)
        while time.monotonic() - started < seconds - every_s:
            name = rng.choice((await _docker("ps", "-qf", f"name=autotraj-{gateway.pid}-")).split() or [""])
            if name:
                kills.append(time.monotonic() - started)
                await _docker("kill", name)
            await asyncio.sleep(every_s)

    async with AsyncSandboxClient(gateway.address) as client:
        await asyncio.gather(kill(), *(one_after_another(client, name) for name in range(concurrency)))
    windows = windows_without_a_kill(ends, kills)
    normal = statistics.median(windows)
    back = [seconds_until_back(ends, at, at + every_s, normal) for at in kills]
    return {
        "seconds": seconds,
        "kills": len(kills),
        "calls": num_sent,
        "replies": sum(statuses.values()),
        "statuses": dict(statuses),
        "wrong": wrong,
        "calls_per_s_without_a_kill": round(normal, 1),
        "calls_per_s_all": round(len(ends) / seconds, 1),
        "seconds_until_back": [round(value, 2) for value in back],
    }


async def _docker(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "docker", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(30):
        output, _ = await process.communicate()
    return output.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between kills")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--out", default="", help="write the figures there, as JSON")
    args = parser.parse_args()
    with LocalGateway(SandboxConfig(memory_mib=256, scratch_mib=16)) as gateway:
        figures = asyncio.run(run(gateway, args.seconds, args.every, args.concurrency))
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
