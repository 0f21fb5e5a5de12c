"""Makes many calls, some hostile, and compares the gateway before and after. Nothing may leak, and no reply may be wrong or
missing.

python -m benchmarks.sandbox_soak --calls 200000 --out soak.json

Exits with 1 if a reply was wrong, missing or `unavailable`, or something leaked. `--out` is written every minute; the same
command goes on where a killed one stopped, with a gateway, and a table, of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sandbox_load import draw
from tool_sandbox.bench import wait_until_full
from tool_sandbox.client import AsyncSandboxClient, SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import GatewayError
from tool_sandbox.local import LocalGateway

SETTLE_S = 8.0
"""Longer than a session may idle: none is open when things are counted."""
SETTLED_S = 180.0
"""The longest wait for containers that start or retire."""
SAVE_S = 60.0
MAX_TOLD = 100
ALLOWANCES = {"gateway memory, MiB": 32.0, "gateway descriptors": 2.0, "gateway threads": 2.0}
"""How much more there may be afterwards, of caches and of connections that are being closed. All else must be equal."""


def holdings(gateway: LocalGateway) -> dict[str, float]:
    """The resources that the gateway and its containers hold now."""
    process = psutil.Process(gateway.pid)
    listed = _docker("ps", "--filter", f"name=autotraj-{gateway.pid}-", "--format", "{{.Names}}").split()
    processes = files = 0
    for name in listed:
        # Lines of `docker top` less its header: supervisor, zygotes, and whatever a call left behind.
        processes += len(_docker("top", name, "-o", "pid").splitlines()) - 1
        # Not even the container's root may read /w/SLOT, so the file systems are asked for their usage.
        used = _docker("exec", name, "sh", "-c", "df /tmp /dev/shm /w/* | tail -n +2").splitlines()
        files += sum(int(line.split()[2]) for line in used)
    return {
        # Itself, the launcher, and one `docker run` a container.
        "gateway processes": 1 + len(process.children(recursive=True)) - len(listed),
        "gateway threads": process.num_threads(),
        "gateway descriptors": process.num_fds(),
        "gateway memory, MiB": round(process.memory_info().rss / 2**20, 1),
        "containers": len(listed),
        "processes in containers": processes,
        "scratch used, KiB": files,
    }


def settled_holdings(gateway: LocalGateway, config: SandboxConfig) -> dict[str, float]:
    """The resources at a moment when no session is open and all containers are up."""
    time.sleep(SETTLE_S)
    with contextlib.suppress(GatewayError):  # if it isn't as before, the table shows it
        wait_until_full(gateway.address, config, SETTLED_S)
    time.sleep(1.0)
    return holdings(gateway)


def leaks(before: dict[str, float], after: dict[str, float]) -> list[str]:
    return [
        f"{name}: {before[name]:g} before, {after[name]:g} after"
        for name in before
        if after[name] > before[name] + ALLOWANCES.get(name, 0.0)
    ]


def _docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


class Soak:
    """Makes the calls `first` to `num_calls`, and counts their results."""

    def __init__(self, first: int, num_calls: int, hostile_share: float) -> None:
        self._numbers = iter(range(first, num_calls))
        self._hostile_share = hostile_share
        self._started = time.monotonic()
        self.statuses: Counter[str] = Counter()
        self.hostile: Counter[str] = Counter()  # by kind and status
        self.num_sent = self.num_wrong = 0
        self.wrong: list[str] = []

    async def run(self, address: str, concurrency: int, seconds: float) -> None:
        async with AsyncSandboxClient(address) as client:
            await asyncio.gather(*(self._caller(client, seconds) for _ in range(concurrency)))

    async def _caller(self, client: AsyncSandboxClient, seconds: float) -> None:
        for number in self._numbers:
            # Of its own number, so that a resumed soak makes the calls that are left.
            call = draw(random.Random(number), number, self._hostile_share)
            self.num_sent += 1
            result = await client.call("python", call.code, timeout_s=call.timeout_s, session_id=call.session_id)
            self.statuses[result.status] += 1
            if call.hostile:
                self.hostile[f"{call.name}: {result.status}"] += 1
            complaint = f"unavailable: {result.message}" if result.status == "unavailable" else call.wrong(result)
            if complaint:
                self.num_wrong += 1
                self.wrong = [*self.wrong, complaint][:MAX_TOLD]
            if time.monotonic() - self._started > seconds:
                return

    def figures(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._started
        return {
            "calls": self.num_sent,
            "replies": sum(self.statuses.values()),
            "seconds": round(seconds, 1),
            "calls_per_s": round(self.num_sent / seconds, 1),
            "statuses": dict(self.statuses),
            "hostile": dict(sorted(self.hostile.items())),
            "num_wrong": self.num_wrong,
            "wrong": self.wrong,
        }


async def run_and_save(
    soak: Soak, gateway: LocalGateway, args: argparse.Namespace, earlier: list[Any], before: Any
) -> None:
    running = asyncio.create_task(soak.run(gateway.address, args.concurrency, args.seconds))
    while not running.done():
        await asyncio.wait({running}, timeout=SAVE_S)
        figures = soak.figures()
        save(args.out, [*earlier, {**figures, "before": before}])
        print(f"{figures['calls']} calls, {figures['calls_per_s']}/s, {soak.num_wrong} complaints", flush=True)
    await running


def save(out: str, parts: list[Any]) -> None:
    if out:
        scratch = Path(out + ".partial")
        scratch.write_text(json.dumps(parts, indent=1))
        scratch.rename(out)  # a kill leaves the last one whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--hostile", type=float, default=0.05, help="share of hostile calls")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end early after so long")
    parser.add_argument("--out", default="", help="write the figures there, as JSON, a list with one part a run")
    args = parser.parse_args()
    earlier = json.loads(Path(args.out).read_text()) if args.out and Path(args.out).exists() else []
    # A call that a killed run had sent, without an answer yet, is made again.
    first = sum(part["replies"] for part in earlier)
    config = SandboxConfig(memory_mib=256, scratch_mib=16, session_idle_s=3.0)
    with LocalGateway(config) as gateway:
        asyncio.run(Soak(0, 500, args.hostile).run(gateway.address, args.concurrency, 120.0))  # what is loaded once
        before = settled_holdings(gateway, config)
        soak = Soak(first, args.calls, args.hostile)
        asyncio.run(run_and_save(soak, gateway, args, earlier, before))
        figures = soak.figures()
        after = settled_holdings(gateway, config)
        with SandboxClient(gateway.address) as client:
            stats = client.stats(timeout_s=60).model_dump()
    leaked = leaks(before, after)
    save(args.out, [*earlier, {**figures, "before": before, "after": after, "leaks": leaked, "stats": stats}])
    total, replies = first + soak.num_sent, first + sum(soak.statuses.values())
    print(f"{total} calls, {replies} replies, {soak.num_wrong} complaints: {soak.wrong[:5]}")
    print(f"this run: {figures['calls']} in {figures['seconds']} s, {figures['statuses']}")
    print(f"hostile: {figures['hostile']}")
    print(
        f"containers: {stats['containers_started']} started, {stats['containers_died']} died, {stats['containers_recycled']}"
    )
    print("\n| | before | after |\n|---|---|---|")
    for name, value in before.items():
        print(f"| {name} | {value:g} | {after[name]:g} |")
    for leak in leaked:
        print(f"LEAKED {leak}")
    num_wrong = soak.num_wrong + sum(part["num_wrong"] for part in earlier)
    return 1 if num_wrong or leaked or replies < total else 0


if __name__ == "__main__":
    sys.exit(main())
