"""Sends Ctrl-C at many moments of a command's start and first steps, once or twice, and checks how the command ends.

    python -m benchmarks.interrupts --last 25 --out interrupts.md
    python -m benchmarks.interrupts --command run --moments 3 9 --twice
    python -m benchmarks.interrupts --after "starting the" --first 0       # on a busy machine: counted from those words on

Ray, vLLM, DeepSpeed and Docker are real. Each try starts `python -m autotraj` on the tiny model in a process group of its
own, as a shell does, and sends SIGINT to the whole group, as a terminal does: at a moment of the grid and, with `--twice`,
once more a while later.

A try fails unless the command ends with 130 within `END_S`, prints neither a traceback nor a native crash, says in its last
line what happened and how to go on, and leaves no process and no container behind `LEFTOVERS_S` later.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.kill_campaign import ROOT, containers_of

SETTINGS = {
    "grpo": [
        "--config",
        "examples/tiny/grpo.toml",
        "data.limit=200",
        "eval.data.limit=16",
        "grpo.num_steps=200",
        "grpo.groups_per_step=4",
        "rollout.group_size=4",
    ],
    "run": [
        "--config",
        "examples/tiny/run.toml",
        "data.limit=200",
        "eval.data.limit=16",
        "synthesis.num_questions=8",
        "synthesis.num_candidates=4",
        "grpo.num_steps=200",
    ],
    "evaluate": ["--config", "examples/tiny/grpo.toml", "eval.data.limit=64"],
}
START_S = 300.0
"""How long the text of `--after` may take to come."""
END_S = 120.0
"""How long after the last signal a command may take to end; a stage ends its step and writes a checkpoint first."""
LEFTOVERS_S = 30.0
CRASHES = (
    "Traceback (most recent call last)",
    "Segmentation fault",
    "Fatal Python error",
    "terminate called",
    "SIGABRT",
)
GO_ON = ("the same command", "--resume", "again")
"""The last line of an interrupted command contains one of these."""


@dataclass
class Try:
    command: str
    moment_s: float
    again_s: float | None  # after the first signal
    after: str  # what the command must have printed before the time is counted
    code: int | None = None
    end_s: float = 0.0  # from the last signal to the end
    last_words: str = ""
    faults: list[str] = field(default_factory=list)


def attempt(one: Try, folder: Path) -> None:
    """Starts the command, interrupts it and records the result."""
    output = folder / "output.log"
    arguments = [*SETTINGS[one.command], *([] if one.command == "evaluate" else [f"run_dir={folder}/run"])]
    with output.open("wb") as file:
        driver = psutil.Popen(
            [sys.executable, "-m", "autotraj", one.command, *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            process_group=0,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
    seen: dict[int, psutil.Process] = {driver.pid: driver}
    until = time.monotonic() + START_S
    while one.after not in output.read_text(errors="replace") and driver.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    started = time.monotonic()
    due = [started + one.moment_s] + ([] if one.again_s is None else [started + one.moment_s + one.again_s])
    until = due[-1] + END_S
    last = started
    while driver.poll() is None and time.monotonic() < until:
        if due and time.monotonic() >= due[0]:
            last = due.pop(0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGINT)
        with contextlib.suppress(psutil.NoSuchProcess):
            seen |= {process.pid: process for process in driver.children(recursive=True)}
        time.sleep(0.05)
    one.code, one.end_s = driver.poll(), time.monotonic() - last
    text = output.read_text(errors="replace")
    one.last_words = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    one.faults += faults(one.code, text)
    one.faults += left_behind(seen)
    for process in seen.values():  # of this try alone, so that it doesn't disturb the next one
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    driver.wait(60)


def faults(code: int | None, text: str) -> Iterator[str]:
    """The faults of a command that ended with `code` (None: it didn't end) and printed `text`."""
    if code is None:
        yield f"not at its end {END_S:.0f} s after the last signal"
    elif code != 130:
        yield f"ended with {code}"
    yield from (f"printed {crash!r}" for crash in CRASHES if crash in text)
    lines = [line for line in text.splitlines() if line.strip()]
    # Rich breaks lines at the width of a terminal that isn't there.
    if not any("interrupted" in line for line in lines[-3:]) or not any(
        way in " ".join(lines[-3:]).lower() for way in GO_ON
    ):
        yield "its last words don't say that it was interrupted and how to go on"


def left_behind(seen: dict[int, psutil.Process]) -> Iterator[str]:
    """Processes and containers of the command that are left `LEFTOVERS_S` after its end."""
    _, alive = psutil.wait_procs([p for p in seen.values() if p.is_running()], timeout=LEFTOVERS_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield f"process {process.pid} is left: {' '.join(process.cmdline())[:120]}"
    until = time.monotonic() + LEFTOVERS_S
    while (containers := containers_of(set(seen))) and time.monotonic() < until:
        time.sleep(1.0)
    if containers:
        yield f"containers are left: {containers}"


def table(tries: list[Try]) -> str:
    """Markdown: a row for each try, and the total."""
    lines = [
        "| command | signals at, s | exit code | ended after, s | last line | faults |",
        "|---|---|---|---|---|---|",
    ]
    for one in tries:
        signals = (
            (f"{one.after!r} + " if one.after else "")
            + f"{one.moment_s:g}"
            + ("" if one.again_s is None else f" and {one.moment_s + one.again_s:.1f}")
        )
        lines.append(
            f"| {one.command} | {signals} | {one.code} | {one.end_s:.1f} | {one.last_words[:110]} | "
            f"{'; '.join(one.faults) or 'none'} |"
        )
    return "\n".join([*lines, "", f"{len(tries)} tries, {sum(bool(one.faults) for one in tries)} with faults."])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--command", choices=sorted(SETTINGS), default="grpo")
    parser.add_argument("--first", type=float, default=0.5, help="moment of the first try, s (default: %(default)s)")
    parser.add_argument("--last", type=float, default=25.0)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--after", default="", metavar="TEXT", help="count moments from when the command prints this")
    parser.add_argument("--moments", type=float, nargs="*", help="instead of a grid: these moments, s")
    parser.add_argument("--twice", action="store_true", help="a second signal, 0.3 to 2 s after the first")
    parser.add_argument("--seed", type=int, default=0, help="of the second signals' times")
    parser.add_argument("--out", type=Path, help="where the table goes, too")
    parser.add_argument("--keep", type=Path, help="keep the tries' output here")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    count = int((args.last - args.first) / args.every) + 1
    tries: list[Try] = []
    with contextlib.ExitStack() as stack:
        root = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for moment in args.moments or [args.first + i * args.every for i in range(count)]:
            one = Try(args.command, moment, rng.uniform(0.3, 2.0) if args.twice else None, args.after)
            tries.append(one)
            folder = root / f"{args.command}-{len(tries)}"
            folder.mkdir(parents=True)
            attempt(one, folder)
            print(table([one]).splitlines()[2], flush=True)
            if args.out:
                args.out.write_text(table(tries) + "\n")
    print(table(tries))
    sys.exit(1 if any(one.faults for one in tries) else 0)


if __name__ == "__main__":
    main()
