"""`run`: the whole method in one command and one folder, each stage resumable.

    base ──▶ synthesize ──▶ sft ──▶ reward-model ──▶ grpo ──▶ report
     └ measured               └ measured              └ measured

`stages.json` says what is done. The same command on the same folder goes on from there. Stages that `stages` leaves out are
neither run nor used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from autotraj.config.run import RunConfig, with_changes
from autotraj.config.stages import StageName
from autotraj.evaluation.endings import explain
from autotraj.evaluation.evaluate import EvalResult
from autotraj.gateways.session import GatewayAccess
from autotraj.interrupt import Interrupt, graceful_interrupt
from autotraj.launch import build_algorithm, engines, evaluate_engines, export_policy, run_session, train
from autotraj.loop.grpo import GRPO, rollout_timeout_of
from autotraj.loop.refreshed_models import require_reward_model
from autotraj.planning import preflight
from autotraj.run_folder.folder import SAME_COMMAND, RunFolder
from autotraj.run_folder.location import RunLocation, write_error
from autotraj.runners.pool import RunnerPool
from autotraj.runners.repairers import repairer_pool
from autotraj.sampling.metrics import reward_parts
from autotraj.stages.resume import at_its_largest
from autotraj.stages.reward_model import train_reward_model
from autotraj.stages.sft import sft
from autotraj.stages.synthesize import Progress, SynthesisPass
from autotraj.status.progress import GrpoProgress, StageProgress
from autotraj.training import supervised
from cluster.exit_codes import EXIT_INTERRUPTED, EXIT_OK
from report.data import read_notes
from report.page import write_report
from storage.locations import join
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
        wanted = self.config.stages
        if "base" not in self.done or ("synthesize" in wanted and "synthesize" not in self.done):
            self.sample_base()
        if "sft" in wanted:
            self.once("sft", self.sft)
        if "reward-model" in wanted:
            self.once("reward-model", self.reward_model)
        if "grpo" in wanted:
            if "grpo" not in self.done:
                self.grpo()
        elif "sft" in wanted and "evaluate-sft" not in self.done:
            with self.engines(self.model("sft")) as pool:
                self.evaluate("sft", pool)
        self.write_summary()

    def only(self, name: StageName) -> None:
        """Runs one stage. Its input must exist."""
        if name == "synthesize":
            candidates = {"rollout.group_size": self.config.synthesis.num_candidates}
            with self.engines(self.config.model, candidates) as pool:
                self.once(name, lambda: self.synthesize(pool))
        else:
            self.once(name, self.sft if name == "sft" else self.reward_model)

    # --- stages -----------------------------------------------------------------------------------------------------

    def sample_base(self) -> None:
        """Measures the base model and samples its candidates with the same engines."""
        candidates = {"rollout.group_size": self.config.synthesis.num_candidates}
        with self.engines(self.config.model, candidates) as pool:
            if "evaluate-base" not in self.done:
                self.evaluate("base", pool)
            if "synthesize" in self.config.stages:
                self.once("synthesize", lambda: self.synthesize(pool))
        self.record("base", {})

    def synthesize(self, pool: RunnerPool) -> dict[str, Any]:
        config = self.config
        folder = self.path / supervised.SYNTHESIS
        folder.mkdir(parents=True, exist_ok=True)
        with (
            StageProgress("synthesize", "questions", self.console) as view,
            repairer_pool(config, self.gateway.access, pool) as repairers,
        ):
            repairers.wait_ready(everyone=False)

            def on_progress(progress: Progress) -> None:
                view.show(progress.num_done, progress.num_questions, _synthesis_note(progress))
                self.push(only_if_due=True)

            synthesis = SynthesisPass(
                config,
                folder,
                pool,
                repairers,
                rollout_timeout_s=rollout_timeout_of(config),
                on_progress=on_progress,
            )
            summary = synthesis.run(self.train_tasks[: config.synthesis.num_questions], self.interrupt)
        dataset_info = summary.pop("dataset_info")
        (folder / "dataset_info.json").write_text(json.dumps(dataset_info, indent=2) + "\n")
        (folder / "synthesis.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.console.print(
            f"synthesize: {summary['num_candidates']} candidates of {summary['num_questions']} questions; "
            f"{summary['num_kept']} kept, {summary['num_repaired']} repaired, {summary['num_hard']} hard; "
            f"{summary['num_sft']} distinct to learn from ({summary['num_sft_duplicates']} duplicates left out) "
            f"({summary['seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s)",
            soft_wrap=True,
        )
        return summary

    def sft(self) -> dict[str, Any]:
        with StageProgress("sft", "steps", self.console) as view:
            figures = sft(self.config, interrupt=self.interrupt, on_step=view.step)
        self.console.print(
            f"sft: {figures['num_steps']} steps on {figures['num_trajectories']} trajectories, last loss "
            f"{figures['last_loss'] or float('nan'):.3f}"
        )
        return figures

    def reward_model(self) -> dict[str, Any]:
        with StageProgress("reward-model", "steps", self.console) as view:
            figures = train_reward_model(self.config, self.model("sft"), interrupt=self.interrupt, on_step=view.step)
        self.console.print(
            f"reward-model: {figures['pair_accuracy']:.1%} of {figures['num_held_out']} held-out pairs in the right order, "
            f"trained on {figures['num_pairs']}",
            soft_wrap=True,
        )
        return figures

    def grpo(self) -> None:
        config = with_changes(
            self.config,
            {
                "model": self.model("sft"),
                "run_dir": join(self.config.run_dir, supervised.GRPO),
                "reward_model.path": self.reward_model_path(),
            },
        )
        folder, checkpoint = RunFolder.stage(self.config, supervised.GRPO)
        with folder:
            if checkpoint is not None:
                require_reward_model(config, checkpoint)
            algo = build_algorithm(config, self.gateway, trajectory_log=folder.trajectory_log)
            try:
                if checkpoint is None and "sft" in self.config.stages and "evaluate-sft" not in self.done:
                    self.evaluate("sft", algo)
                if checkpoint is not None:
                    algo.restore_from_path(checkpoint.folder, learners=checkpoint.learners)
                    self.console.print(f"grpo: resumed at step {algo.policy_version}")
                started = time.monotonic()
                with GrpoProgress(config.grpo.num_steps, self.console) as view:
                    complete = train(
                        algo, folder, num_steps=config.grpo.num_steps, on_step=view.grpo_step, interrupt=self.interrupt
                    )
                if not complete:
                    raise supervised.Interrupted
                export_policy(algo, folder)
                self.evaluate("grpo", algo, seconds=time.monotonic() - started)
            finally:
                algo.stop()
        self.record("grpo", {"num_steps": config.grpo.num_steps})

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

    def model(self, after: StageName) -> str:
        """The policy that a stage has made, or the base if that stage isn't part of this run."""
        if after == "sft" and "sft" in self.config.stages:
            return supervised.require_model(self.location, supervised.SFT, "policy", made_by="sft")
        return self.config.model

    def reward_model_path(self) -> str:
        if "reward-model" in self.config.stages:
            return supervised.require_model(self.location, supervised.REWARD_MODEL, "model", made_by="reward-model")
        return self.config.reward_model.path

    def once(self, name: StageName, work: Callable[[], dict[str, Any]]) -> None:
        if name in self.done:
            return
        started = time.monotonic()
        self.record(name, work() | {"stage_seconds": round(time.monotonic() - started, 1)})

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
        measured = [
            self.done[f"evaluate-{name}"] for name in ("base", "sft", "grpo") if f"evaluate-{name}" in self.done
        ]
        total = time.monotonic() - self.started
        summary = {
            "model": self.config.model,
            "seed": self.config.seed,
            "stages": measured,
            "total_seconds": round(total, 1),
            "notes": list(read_notes(self.path)),
            **{
                name.replace("-", "_"): self.done[name]
                for name in ("synthesize", "sft", "reward-model")
                if name in self.done
            },
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


def execute_stage(name: StageName, config: RunConfig, console: Console) -> int:
    """Runs one stage that isn't done and whose input exists; returns the exit code."""
    with graceful_interrupt() as interrupt, run_session(config, sandbox=name == "synthesize") as gateway:
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


def _synthesis_note(progress: Progress) -> str:
    speed = progress.num_tokens / progress.seconds if progress.seconds else 0.0
    return (
        f"{progress.num_kept} kept, {progress.num_repaired} repaired, {progress.num_hard} hard, "
        f"{progress.num_dropped} dropped; {speed:.0f} tokens/s"
    )
