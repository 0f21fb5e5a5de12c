"""Many calls, some hostile, and what the gateway holds before and after: nothing may leak, no reply be wrong or missing.

python -m benchmarks.sandbox_soak --calls 200000 --out soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sandbox_load import draw
from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import LocalGateway

SETTLE_S = 8.0
"""Longer than a session may idle: none is open when things are counted."""


def holdings(gateway: LocalGateway) -> dict[str, float]:
    """What the gateway and its containers hold now."""
    process = psutil.Process(gateway.pid)
    listed = _docker("ps", "--filter", f"name=autotraj-{gateway.pid}-", "--format", "{{.Names}}").split()
    processes = files = 0
    for name in listed:
        # Lines of `docker top` less its header: supervisor, zygotes, and whatever a call left behind.
        processes += len(_docker("top", name, "-o", "pid").splitlines()) - 1
        # Not even the container's root may look into /w/SLOT: what is used is asked of the file systems.
        used = _docker("exec", name, "sh", "-c", "df /tmp /w/* | tail -n +2").splitlines()
        files += sum(int(line.split()[2]) for line in used)
    return {
        "gateway processes": 1 + len(process.children(recursive=True)) - len(listed),
        "gateway threads": process.num_threads(),
        "gateway descriptors": process.num_fds(),
        "gateway memory, MiB": round(process.memory_info().rss / 2**20, 1),
        "containers": len(listed),
        "processes in containers": processes,
        "scratch used, KiB": files,
    }


def _docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


async def soak(
    address: str, num_calls: int, concurrency: int, hostile_share: float, seconds: float
) -> tuple[Counter[str], list[str], int]:
    """Replies by status, what was wrong, and how many calls were sent; ends early after `seconds`."""
    numbers = iter(range(num_calls))
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    rng = random.Random(0)
    until = time.monotonic() + seconds
    num_sent = 0

    async def one_after_another(client: AsyncSandboxClient) -> None:
        nonlocal num_sent
        for number in numbers:
            if time.monotonic() > until:
                return
            call = draw(rng, number, hostile_share)
            num_sent += 1
            result = await client.call("python", call.code, timeout_s=call.timeout_s, session_id=call.session_id)
            statuses[result.status] += 1
            if result.status == "unavailable" and len(wrong) < 100:
                wrong.append(f"unavailable: {result.message}")
            elif complaint := call.wrong(result):
                wrong.append(complaint)

    async with AsyncSandboxClient(address) as client:
        await asyncio.gather(*(one_after_another(client) for _ in range(concurrency)))
    return statuses, wrong, num_sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--hostile", type=float, default=0.05, help="share of hostile calls")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end early after so long")
    parser.add_argument("--out", default="", help="write the figures there, as JSON")
    args = parser.parse_args()
    with LocalGateway(SandboxConfig(memory_mib=256, scratch_mib=16, session_idle_s=3.0)) as gateway:
        asyncio.run(soak(gateway.address, 500, args.concurrency, args.hostile, 120.0))  # what is loaded once
        time.sleep(SETTLE_S)
        before, started = holdings(gateway), time.monotonic()
        statuses, wrong, num_sent = asyncio.run(
            soak(gateway.address, args.calls, args.concurrency, args.hostile, args.seconds)
        )
        seconds = time.monotonic() - started
        time.sleep(SETTLE_S)
        after = holdings(gateway)
        with SandboxClient(gateway.address) as client:
            stats = client.stats().model_dump()
    figures: dict[str, Any] = {
        "calls": num_sent,
        "replies": sum(statuses.values()),
        "seconds": round(seconds, 1),
        "calls_per_s": round(num_sent / seconds, 1),
        "statuses": dict(statuses),
        "wrong": wrong,
        "before": before,
        "after": after,
        "stats": stats,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1))
    print(f"{num_sent} calls in {seconds:.0f} s ({num_sent / seconds:.1f}/s), {len(wrong)} complaints: {wrong[:5]}")
    print(f"replies: {dict(statuses)}\n\n| | before | after |\n|---|---|---|")
    for name, value in before.items():
        print(f"| {name} | {value:g} | {after[name]:g} |")


if __name__ == "__main__":
    main()
