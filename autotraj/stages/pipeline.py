"""`run`: the whole method in one command and one folder, each stage resumable.

    base ──▶ synthesize ──▶ sft ──▶ reward-model ──▶ grpo ──▶ report
     └ measured               └ measured              └ measured

`stages.json` says what is done. The same command on the same folder goes on from there. Stages that `stages` leaves out are
neither run nor used.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console

from autotraj.config.run import RunConfig, with_changes
from autotraj.config.stage_registry import SFT, STAGES, Stage
from autotraj.evaluation.endings import explain
from autotraj.evaluation.evaluate import EvalResult
from autotraj.gateways.session import GatewayAccess
from autotraj.interrupt import Interrupt, graceful_interrupt
from autotraj.launch import engines, evaluate_engines, run_session
from autotraj.loop.grpo import GRPO
from autotraj.planning import preflight
from autotraj.run_folder.folder import SAME_COMMAND
from autotraj.run_folder.location import RunLocation, write_error
from autotraj.runners.pool import RunnerPool
from autotraj.sampling.metrics import reward_parts
from autotraj.stages.resume import at_its_largest
from autotraj.training import supervised
from cluster.exit_codes import EXIT_INTERRUPTED, EXIT_OK
from report.data import read_notes
from report.page import write_report
from storage.objects import StorageError
from trajectory.log import TrajectoryLog
from trajectory.types import Group

NUM_SAMPLES = 24
"""How many groups of each evaluation the report shows."""


class Pipeline:
    """Runs the stages of one run folder. Use it within `run_session`."""

    def __init__(self, config: RunConfig, gateway: GatewayAccess, console: Console, interrupt: Interrupt) -> None:
        self.config = config
        self.location = RunLocation.of(config)
        self.path = self.location.path
        self.gateway = gateway
        self.console = console
        self.interrupt = interrupt
        self.started = time.monotonic()
        self.done = supervised.read_done(self.path)
        self.train_tasks, self.eval_tasks = preflight.check(config)

    def run(self) -> None:
        """Runs the stages that aren't done yet. Raises `supervised.Interrupted`."""
        wanted = [STAGES[name] for name in self.config.stages]
        if "base" not in self.done or any(stage.samples and stage.name not in self.done for stage in wanted):
            self.sample_base()
        for stage in wanted:
            if not stage.samples:
                self.once(stage)
        if "sft" in self.config.stages and "grpo" not in self.config.stages and "evaluate-sft" not in self.done:
            # GRPO would have measured it, with its own engines.
            with self.engines(supervised.require_model(self.location, SFT.folder, "policy", made_by=SFT.name)) as pool:
                self.evaluate("sft", pool)
        self.write_summary()

    def only(self, name: str) -> None:
        """Runs one stage. Its input must exist."""
        stage = STAGES[name]
        if not stage.samples:
            self.once(stage)
            return
        with self.engines_of_base() as pool:
            self.once(stage, pool)

    def sample_base(self) -> None:
        """Measures the base model, and runs the stages that sample from it with the same engines."""
        with self.engines_of_base() as pool:
            if "evaluate-base" not in self.done:
                self.evaluate("base", pool)
            for name in self.config.stages:
                if STAGES[name].samples:
                    self.once(STAGES[name], pool)
        self.record("base", {})

    def once(self, stage: Stage, *engines: RunnerPool) -> None:
        """Runs `stage` unless it is done, and records its figures."""
        if stage.name in self.done:
            return
        started = time.monotonic()
        module, function = stage.run.split(":")
        figures = getattr(importlib.import_module(module), function)(self, *engines)
        self.record(stage.name, figures | {"stage_seconds": round(time.monotonic() - started, 1)})

    # --- measuring --------------------------------------------------------------------------------------------------

    def evaluate(self, name: str, source: GRPO | RunnerPool, *, seconds: float = 0.0) -> None:
        """`seconds` is the time of the stage's training, which is shown with that of the evaluation."""
        result = evaluate_engines(name, source, self.config, self.eval_tasks)
        self.write_samples(name, result.groups)
        self.record(f"evaluate-{name}", stage_entry(result, seconds))
        self.console.print(
            f"{name}: accuracy {result.accuracy:.1%} ± {result.accuracy_ci95:.1%} on {result.num_problems} problems, "
            f"tool-call rate {result.tool_call_rate:.0%} ({result.seconds:.0f} s)",
            soft_wrap=True,
        )
        for line in explain(result.groups):
            self.console.print(f"{name}: {line}", markup=False, highlight=False, soft_wrap=True)

    def write_samples(self, name: str, groups: Sequence[Group]) -> None:
        folder = self.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.log"
        path.unlink(missing_ok=True)
        log = TrajectoryLog(path)
        for group in groups[:NUM_SAMPLES]:
            log.append(group)
        log.close()

    # --- the folder -------------------------------------------------------------------------------------------------

    @contextmanager
    def engines(self, model: str, changes: dict[str, Any] | None = None) -> Iterator[RunnerPool]:
        with engines(with_changes(self.config, {"model": model, **(changes or {})}), self.gateway) as pool:
            yield pool

    def engines_of_base(self) -> AbstractContextManager[RunnerPool]:
        return self.engines(self.config.model, {"rollout.group_size": self.config.synthesis.num_candidates})

    def record(self, name: str, figures: dict[str, Any]) -> None:
        """Records in `stages.json` that this is done."""
        self.done[name] = figures
        supervised.write_done(self.path, self.done)
        self.push()

    def push(self, *, only_if_due: bool = False) -> None:
        """Uploads what has changed, if the run is kept at a URI. Raises RunError."""
        try:
            self.location.push(only_if_due=only_if_due)
        except (StorageError, OSError) as error:
            kept = f"These are done: {', '.join(self.done) or 'none'}"
            raise write_error(
                self.location, "the run's files could not be written", error, kept=kept, go_on=SAME_COMMAND
            ) from error

    def write_summary(self) -> None:
        measured = [self.done[f"evaluate-{name}"] for name in ("base", *STAGES) if f"evaluate-{name}" in self.done]
        total = time.monotonic() - self.started
        summary = {
            "model": self.config.model,
            "seed": self.config.seed,
            "stages": measured,
            "total_seconds": round(total, 1),
            "notes": list(read_notes(self.path)),
            **{name.replace("-", "_"): self.done[name] for name in STAGES if name in self.done},
        }
        (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        report = write_report(self.path)
        self.push()
        self.console.print(f"{total:.0f} s in all. Figures: {self.path / 'summary.json'}. Report: {report}")
        if self.location.storage:
            self.console.print(f"All of it is at {self.location}", soft_wrap=True)


def stage_entry(result: EvalResult, seconds: float) -> dict[str, Any]:
    """One entry of `summary.json`; `seconds` is the time of the stage's training and of its evaluation."""
    return {
        "name": result.name,
        "accuracy": round(result.accuracy, 4),
        "accuracy_ci95": round(result.accuracy_ci95, 4),
        "num_problems": result.num_problems,
        "tool_call_rate": round(result.tool_call_rate, 4),
        "mean_reward": round(result.mean_reward, 4),
        "mean_reward_ci95": round(result.mean_reward_ci95, 4),
        "reward_parts": {name: round(value, 4) for name, value in reward_parts(result.groups).items()},
        "seconds": round(seconds + result.seconds, 1),
    }


def execute(config: RunConfig, console: Console) -> int:
    """Starts or continues the pipeline of a checked `config` in its folder; returns the exit code."""
    console.print(
        f"[bold]AutoTraj[/bold]: {config.model}; stages {', '.join(config.stages)}; run folder {config.run_dir}\n"
        "starting the sandbox, Ray and the engines …",
        soft_wrap=True,
    )
    with graceful_interrupt() as interrupt, run_session(at_its_largest(config)) as gateway:
        pipeline = Pipeline(config, gateway, console, interrupt)
        try:
            pipeline.run()
        except supervised.Interrupted:
            return _interrupted(pipeline)
    return EXIT_OK


def execute_stage(name: str, config: RunConfig, console: Console) -> int:
    """Runs one stage that isn't done and whose input exists; returns the exit code."""
    with graceful_interrupt() as interrupt, run_session(config, sandbox=STAGES[name].samples) as gateway:
        pipeline = Pipeline(config, gateway, console, interrupt)
        try:
            pipeline.only(name)
        except supervised.Interrupted:
            return _interrupted(pipeline)
    return EXIT_OK


def _interrupted(pipeline: Pipeline) -> int:
    pipeline.push()
    remaining = supervised.remaining(pipeline.config.stages, pipeline.done)
    pipeline.console.print(
        f"interrupted; the same command goes on with {pipeline.location}. {remaining}", soft_wrap=True
    )
    return EXIT_INTERRUPTED
