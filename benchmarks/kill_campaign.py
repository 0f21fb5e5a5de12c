"""Kills random parts in all stages of runs of the whole method, and checks what those runs leave.

    python -m benchmarks.kill_campaign --kills 50 --seed 0 --out campaign.md

vLLM, DeepSpeed, Ray, Docker and the pipeline are real. Each run is `python -m autotraj run` on the tiny model, shortened. At
random moments (start, sampling, training, saving, export, evaluation) one process, chosen at random, gets SIGKILL: the
driver, a learner, a rollout, repair or reward-model actor, an engine's core, the gateway, a container, the raylet or Ray's
control store. If this ends the command, it is given again, as a user would, until the run is complete.

Then the checker reads the run's folder. It isn't told what was killed. It counts as a fault: a command that can't go on, no
progress for `PATIENCE_S`, a Python traceback in the driver's output, a step that is missing or doubled in a stage's metrics,
a prompt that the ledger lost or doubled, a group that is twice in the trajectory log, a question that stage 1 lost or
doubled, a model that doesn't load or isn't finite, and a process or container that is left after its run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgpack
import psutil

from autotraj.config.run import load
from autotraj.loop.saved_loop import STATE_FILE
from autotraj.run_folder.folder import latest_checkpoint
from autotraj.stages.synthesize import read_journal
from tasks.load import load_tasks
from tool_sandbox.left_behind import LABEL
from trajectory.log import read_log
from trajectory.records import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "examples/tiny/run.toml"
NUM_STEPS, GROUPS_PER_STEP, NUM_QUESTIONS = 10, 8, 24
SETTINGS = [
    "data.limit=400",
    "eval.data.limit=64",
    f"synthesis.num_questions={NUM_QUESTIONS}",
    "synthesis.num_candidates=6",
    "sft.batch_size=8",
    "sft.checkpoint_every=3",
    "reward_model.epochs=1",
    "reward_model.batch_pairs=8",
    "reward_model.held_out=0.4",
    "reward_model.evaluate_every=3",
    f"grpo.num_steps={NUM_STEPS}",
    f"grpo.groups_per_step={GROUPS_PER_STEP}",
    "grpo.checkpoint_every=2",
    "rollout.group_size=4",
    "online_repair.refresh_every=3",
    "online_repair.min_pairs=2",
]
OWN_REPAIRER = [
    'repair.repairer="engine"',
    'repair.engine={model="examples/tiny/base",max_model_len=1024,max_num_seqs=64,cpu_kv_cache_gib=1}',
]
"""Settings of every other run, which has separate repair actors."""

PATIENCE_S = 420.0
"""The longest time without anything new in the run's folder or its output."""
SHARE_HASTY = 0.25
"""The share of the kills after which another may come before the run makes progress again."""
ENDS_COMMAND = ("driver", "raylet", "control store")
"""Parts without which a command can't go on. It may still make progress for a moment before it ends."""
LEFTOVERS_S = 90.0
"""How long a run's processes may exist after its end. Two agents of Ray's end 60 s after the control store was killed."""
MAX_COMMANDS = 25
"""If one run's command was given this often, the run counts as one that can't go on."""


def status(run: Path) -> str:
    """What the controller does, from the newest status in the run's folder."""
    found = []
    for path in [run / "status.json", *run.glob("*/status.json")]:
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return str(max(found, key=lambda s: float(s["time"]))["doing"]) if found else ""


def done(run: Path) -> set[str]:
    with contextlib.suppress(OSError, ValueError):
        return set(json.loads((run / "stages.json").read_text()))
    return set()


def num_lines(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.read_bytes().count(b"\n")
    return 0


@dataclass(frozen=True)
class Moment:
    """A part of a run in which something is killed."""

    name: str
    now: Callable[[Path], bool]  # whether the run's folder shows that it is at this moment
    over: str  # after this entry of stages.json the moment can't come any more
    spread_s: float  # the kill follows after a random time up to this


MOMENTS = (
    Moment("start", lambda run: True, "base", 40.0),
    Moment("evaluate base", lambda run: status(run) == "evaluates base", "evaluate-base", 2.0),
    Moment("synthesize", lambda run: (run / "synthesis/journal.log").is_file(), "synthesize", 6.0),
    Moment("sft: start", lambda run: (run / "sft/metrics.jsonl").is_file(), "sft", 10.0),
    Moment("sft: step", lambda run: num_lines(run / "sft/metrics.jsonl") > 0, "sft", 3.0),
    Moment("sft: save", lambda run: any((run / "sft/checkpoints").glob(".*.partial")), "sft", 0.05),
    Moment("sft: export", lambda run: (run / "sft/.policy.partial").is_dir(), "sft", 0.05),
    Moment("reward model: step", lambda run: num_lines(run / "reward_model/metrics.jsonl") > 0, "reward-model", 3.0),
    Moment("reward model: export", lambda run: (run / "reward_model/.model.partial").is_dir(), "reward-model", 0.05),
    Moment("grpo: start", lambda run: (run / "grpo/metrics.jsonl").is_file(), "grpo", 40.0),
    Moment("grpo: step", lambda run: num_lines(run / "grpo/metrics.jsonl") > 0, "grpo", 12.0),
    Moment("grpo: after a refresh", lambda run: num_lines(run / "grpo/metrics.jsonl") > 3, "grpo", 12.0),
    Moment("grpo: save", lambda run: any((run / "grpo/checkpoints").glob(".*.partial")), "grpo", 0.1),
    Moment("grpo: export", lambda run: (run / "grpo/.policy.partial").is_dir(), "grpo", 0.05),
    Moment("evaluate grpo", lambda run: status(run) == "evaluates grpo", "evaluate-grpo", 2.0),
)

PARTS = {
    "learner": r"ray::Learner|ray::learner",
    "reward-model learner": r"ray::reward-model-learner",
    "rollout actor": r"ray::RolloutActor|ray::rollout",
    "repair actor": r"ray::RepairActor|ray::repair",
    "reward-model actor": r"ray::RewardModelActor|ray::reward-model(?!-learner)",
    "engine core": r"VLLM::EngineCore|EngineCore",
    "gateway": r"tool_sandbox\.server",
    "raylet": r"raylet/raylet",
    "control store": r"gcs_server",
}
"""What may be killed besides the driver and a container → a pattern of its command line."""


@dataclass
class Kill:
    moment: str
    part: str
    ended: str = "–"  # the exit code and last output of the command, if the kill ended it
    back_s: float | None = None  # until something new was in the run's folder


@dataclass
class Run:
    """One run folder, the commands given for it, and the result of each kill."""

    folder: Path
    settings: list[str]
    rng: random.Random
    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_commands: int = 0
    seen: dict[int, psutil.Process] = field(
        default_factory=dict
    )  # every process that a command of this run ever started

    @property
    def path(self) -> Path:
        return self.folder / "run"

    def start(self) -> psutil.Popen:
        self.num_commands += 1
        command = [sys.executable, "-m", "autotraj", "run", "--config", CONFIG, f"run_dir={self.path}", *self.settings]
        with self.output.open("wb") as output:
            driver = psutil.Popen(command, cwd=ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        self.seen[driver.pid] = driver
        return driver

    @property
    def output(self) -> Path:
        return self.folder / f"command-{self.num_commands}.log"

    def processes(self, driver: psutil.Popen) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = driver.children(recursive=True)
            self.seen |= {process.pid: process for process in found}
            return [driver, *found]
        return []

    def progress(self) -> tuple[object, ...]:
        """A value that changes whenever the run makes progress."""
        sizes = [num_lines(self.path / stage / "metrics.jsonl") for stage in ("sft", "reward_model", "grpo")]
        journal = self.path / "synthesis/journal.log"
        return (*sizes, journal.stat().st_size if journal.is_file() else 0, len(done(self.path)))


def victims(run: Run, driver: psutil.Popen) -> dict[str, Callable[[], None]]:
    """Part → how it is killed, for every part that is there now."""
    found: dict[str, Callable[[], None]] = {"driver": driver.kill}
    processes = run.processes(driver)
    for process in processes[1:]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = " ".join(process.cmdline()) or process.name()
            for part, pattern in PARTS.items():
                if re.search(pattern, words) and process.status() != psutil.STATUS_ZOMBIE:
                    found.setdefault(part, process.kill)
    if containers := containers_of({process.pid for process in processes}):
        name = run.rng.choice(containers)
        found["container"] = lambda: subprocess.run(
            ["docker", "kill", name], capture_output=True, timeout=60
        ).check_returncode()
    return found


def containers_of(pids: set[int]) -> list[str]:
    """Containers whose gateway is one of the processes `pids`."""
    template = f'{{{{.Names}}}} {{{{.Label "{LABEL}"}}}}'
    command = ["docker", "ps", "--filter", f"label={LABEL}", "--format", template]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    rows = [line.partition(" ") for line in listed.splitlines()]
    return [name for name, _, owner in rows if owner.split("-")[1:2] and int(owner.split("-")[1]) in pids]


def drive(run: Run, moments: list[Moment]) -> None:
    """Gives the run's command, again whenever a kill has ended it, and kills at `moments`, in their order."""
    driver = run.start()
    waiting, due, pending = list(moments), None, None  # pending: the last kill, until the run makes progress again
    hasty = False  # whether the next kill may come before that
    last, last_change, killed_at, listed = run.progress(), time.monotonic(), 0.0, 0.0
    while True:
        now = time.monotonic()
        if now - listed > 1.0:
            run.processes(driver)
            listed = now
        if (progress := run.progress()) != last:
            last, last_change = progress, now
            if pending is not None and (pending.part not in ENDS_COMMAND or pending.ended != "–"):
                pending.back_s, pending = now - killed_at, None
        if driver.poll() is not None:
            _look_at_end(run, driver, pending)
            if driver.returncode == 0:
                return
            if run.num_commands >= MAX_COMMANDS:
                run.faults.append(f"can't go on: the command ended {MAX_COMMANDS} times")
                return
            if driver.returncode != -signal.SIGKILL and pending is None:
                run.faults.append(
                    f"command {run.num_commands} ended with {driver.returncode} though nothing was killed"
                )
                return
            driver, due, last_change = run.start(), None, now
            continue
        if now - last_change > PATIENCE_S:
            run.faults.append(f"nothing new for {PATIENCE_S:.0f} s: {status(run.path)}; {_last_words(run.output)}")
            for process in reversed(run.processes(driver)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            driver.wait(60)
            return
        while waiting and waiting[0].over in done(run.path):
            waiting.pop(0)  # it passed unnoticed
            due = None
        if waiting and due is None and (pending is None or hasty) and waiting[0].now(run.path):
            due = now + run.rng.uniform(0.0, waiting[0].spread_s)
        if waiting and due is not None and now >= due:
            found = victims(run, driver)
            part = run.rng.choice(sorted(found))
            with contextlib.suppress(psutil.NoSuchProcess, subprocess.CalledProcessError):
                found[part]()
                pending, killed_at, last_change = Kill(waiting[0].name, part), time.monotonic(), now
                hasty = run.rng.random() < SHARE_HASTY
                run.kills.append(pending)
                print(f"  {time.strftime('%H:%M:%S')} {waiting[0].name}: {part}", flush=True)
            waiting.pop(0)
            due = None
        time.sleep(0.005 if waiting and waiting[0].spread_s < 1.0 else 0.05)


def _look_at_end(run: Run, driver: psutil.Popen, pending: Kill | None) -> None:
    text = run.output.read_text(errors="replace")
    code = driver.returncode
    if code not in (0, 1, -signal.SIGKILL):
        run.faults.append(f"command {run.num_commands} ended with {code}: {_last_words(run.output)}")
    if "Traceback (most recent call last)" in text and code != -signal.SIGKILL:
        run.faults.append(f"command {run.num_commands} printed a traceback ({run.output})")
    if pending is not None and code != 0:
        pending.ended = "killed" if code == -signal.SIGKILL else f"{code}: {_last_words(run.output)}"


def _last_words(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("failed:", "error:"))]
    return (said or lines or ["nothing"])[-1][:200]


# --- the checker: reads what a complete run left, and knows nothing of the kills ----------------------------------------


def check(run: Run) -> Iterator[str]:
    """Faults of a run whose command ended with 0."""
    folder = run.path
    expected = {"base", "evaluate-base", "synthesize", "sft", "evaluate-sft", "reward-model", "grpo", "evaluate-grpo"}
    if missing := expected - done(folder):
        yield f"stages.json lacks {sorted(missing)}"
    if not (folder / "report.html").is_file():
        yield "there is no report.html"
    yield from check_synthesis(folder)
    for stage in ("sft", "reward_model", "grpo"):
        yield from check_steps(folder / stage / "metrics.jsonl", NUM_STEPS if stage == "grpo" else None)
    yield from check_ledger(folder)
    yield from check_log(folder / "grpo/trajectories.log")
    for model in ("sft/policy", "reward_model/model", "grpo/policy"):
        yield from check_model(folder / model)


def check_synthesis(folder: Path) -> Iterator[str]:
    asked = [record.group.task.id for record in read_journal(folder / "synthesis")]
    if doubled := [task for task, count in Counter(asked).items() if count > 1]:
        yield f"stage 1 has questions twice: {doubled[:3]}"
    dropped = int(json.loads((folder / "synthesis/synthesis.json").read_text()).get("num_dropped", 0))
    if len(asked) + dropped != NUM_QUESTIONS:
        yield f"stage 1 has {len(asked)} questions and {dropped} dropped of {NUM_QUESTIONS}"
    if not list(read_jsonl(folder / "synthesis/sft.jsonl", ["messages"])):
        yield "sft.jsonl is empty"


def check_steps(metrics: Path, num_steps: int | None) -> Iterator[str]:
    """Checks that every step is there once, in order. Lines of measurements have their step's number and no loss."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [
        int(line["step"])
        for line in lines
        if not all(name.startswith("held_out/") for name in line.keys() - {"step", "time"})
    ]
    if steps != list(range(1, len(steps) + 1)) or (num_steps is not None and len(steps) != num_steps):
        yield f"{metrics.parent.name}: steps {steps}"


def check_ledger(folder: Path) -> Iterator[str]:
    """Checks that every (task, epoch) is waiting, in flight, trained or dropped, and that each step trained its number."""
    checkpoint = latest_checkpoint(folder / "grpo")
    if checkpoint is None:
        yield "grpo has no checkpoint"
        return
    ledger = msgpack.unpackb((checkpoint / STATE_FILE).read_bytes(), strict_map_key=False)["ledger"]
    num_tasks = len(load_tasks(load(folder / "config.toml").data))
    waiting = len(ledger["order"]) // 4 + len(ledger["returned"])
    dropped = sum(ledger["drop_reasons"].values())
    total = waiting + len(ledger["in_flight"]) + ledger["trained"] + dropped
    if total != num_tasks * (ledger["epoch"] + 1):
        yield f"the ledger holds {total} prompts of {num_tasks * (ledger['epoch'] + 1)}"
    if ledger["trained"] != NUM_STEPS * GROUPS_PER_STEP or ledger["last_step"] != NUM_STEPS:
        yield f"{ledger['trained']} prompts are trained on in {ledger['last_step']} steps"
    # A step whose groups all have equal rewards teaches nothing: its prompts are dropped by that name, whatever is killed.
    if lost := {reason: count for reason, count in ledger["drop_reasons"].items() if reason != "no_variance"}:
        yield f"prompts were dropped: {lost}"


def check_log(log: Path) -> Iterator[str]:
    leases = Counter(group.lease_id for group in read_log(log))
    if doubled := [lease for lease, count in leases.items() if count > 1]:
        yield f"{log.name} holds {len(doubled)} leases twice, one is {doubled[0]}"
    if len(leases) < NUM_STEPS * GROUPS_PER_STEP:
        yield f"{log.name} holds {len(leases)} groups, and {NUM_STEPS * GROUPS_PER_STEP} were trained on"


def check_model(folder: Path) -> Iterator[str]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    AutoConfig.from_pretrained(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        yield f"{folder} holds no weights"
    for path in files:
        if bad := [name for name, tensor in load_file(path).items() if not torch.isfinite(tensor).all()]:
            yield f"{path}: not finite: {bad[:3]}"


def check_leftovers(run: Run) -> Iterator[str]:
    """Processes and containers of the run that are left `LEFTOVERS_S` after its end."""
    _, alive = psutil.wait_procs([p for p in run.seen.values() if p.is_running()], timeout=LEFTOVERS_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield f"process {process.pid} outlives the run: {' '.join(process.cmdline())[:120]}"
    if containers := containers_of(set(run.seen)):
        yield f"containers outlive the run: {containers}"


def table(runs: list[Run]) -> str:
    """Markdown: a row for each pair of moment and part, and the totals."""
    rows: dict[tuple[str, str], list[Kill]] = {}
    for kill in (kill for run in runs for kill in run.kills):
        rows.setdefault((kill.moment, kill.part), []).append(kill)
    order = [moment.name for moment in MOMENTS]
    lines = ["| moment | killed | times | the command | next progress, s |", "|---|---|---|---|---|"]
    for (moment, part), kills in sorted(rows.items(), key=lambda row: (order.index(row[0][0]), row[0][1])):
        ended = sorted({"went on by itself" if kill.ended == "–" else f"ended ({kill.ended})" for kill in kills})
        back = ", ".join(f"{kill.back_s:.0f}" if kill.back_s is not None else "–" for kill in kills)
        lines.append(f"| {moment} | {part} | {len(kills)} | {'; '.join(ended)} | {back} |")
    faults = [fault for run in runs for fault in run.faults]
    num_kills, num_commands = sum(len(run.kills) for run in runs), sum(run.num_commands for run in runs)
    lines += ["", f"{num_kills} kills in {len(runs)} runs, {num_commands} commands; {len(faults)} faults."]
    return "\n".join([*lines, *(f"- {fault}" for fault in faults)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=7, help="kills planned in one run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the table goes, too")
    parser.add_argument("--keep", type=Path, help="keep the runs' folders here")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    runs: list[Run] = []
    with contextlib.ExitStack() as stack:
        root = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        while (killed := sum(len(run.kills) for run in runs)) < args.kills:
            folder = root / f"run-{len(runs)}"
            folder.mkdir(parents=True)
            extra = OWN_REPAIRER if len(runs) % 2 == 0 else []
            run = Run(folder, [*SETTINGS, f"seed={len(runs)}", f"sandbox.search.index={folder}/corpus", *extra], rng)
            runs.append(run)
            count = min(args.per_run, args.kills - killed)
            chosen = sorted(rng.choices(range(len(MOMENTS)), k=count))
            print(f"run {len(runs) - 1}: {', '.join(MOMENTS[i].name for i in chosen)}", flush=True)
            drive(run, [MOMENTS[i] for i in chosen])
            if not run.faults:
                run.faults += check(run)
            run.faults += check_leftovers(run)
            print(
                f"run {len(runs) - 1}: {len(run.kills)} kills, {run.num_commands} commands, faults: {run.faults or 'none'}"
            )
            if args.out:
                args.out.write_text(table(runs) + "\n")
    print(table(runs))
    sys.exit(1 if any(run.faults for run in runs) else 0)


if __name__ == "__main__":
    main()
