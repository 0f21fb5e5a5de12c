"""The commands that train and measure, with all checks that come before heavy imports.

Configuration, model, data and folders are checked first. Only then are Ray, torch and RLlib imported, which takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from autotraj.config.run import RunConfig, load, with_changes
from autotraj.config.stage_registry import STAGES
from autotraj.errors import UserError
from autotraj.evaluation.endings import explain
from autotraj.interrupt import graceful_interrupt
from autotraj.loop.refreshed_models import require_reward_model
from autotraj.planning import preflight
from autotraj.run_folder.claim import held
from autotraj.run_folder.folder import Checkpoint, RunFolder
from autotraj.run_folder.location import RunLocation
from autotraj.stages.resume import is_complete, open_folder
from autotraj.status.progress import GrpoProgress
from autotraj.training import supervised
from cluster.exit_codes import EXIT_INTERRUPTED, EXIT_OK
from storage.locations import is_uri
from storage.objects import RETRY_S, scratch


def run(config_path: str | None, overrides: Sequence[str], dry_run: bool) -> int:
    """`python -m autotraj run`."""
    if dry_run:
        return _dry_run(load(config_path, overrides))
    return run_all(load(config_path, overrides), Console())


def run_all(config: RunConfig, console: Console) -> int:
    """Run all stages of `config`, or those that are still to do; returns the exit code."""
    if is_complete(config):
        return _complete(config, console)
    train, held_out = preflight.check(config)
    with held(RunLocation.of(config)):
        if open_folder(config):
            return _complete(config, console)
        preflight.check_last(config, {"data": train, "eval.data": held_out})
        if any(STAGES[name].samples for name in config.stages):
            _tell_of_template(config, console)

        from autotraj.stages.pipeline import execute

        return execute(config, console)


def _complete(config: RunConfig, console: Console) -> int:
    location = RunLocation.of(config)
    more = " For more steps give a larger grpo.num_steps with the same command" if "grpo" in config.stages else ""
    console.print(
        f"already complete: {', '.join(config.stages) or 'base'} are done in {location}. "
        f"Figures: {location.place('summary.json')}. Report: {location.place('report.html')}.{more}",
        soft_wrap=True,
    )
    return EXIT_OK


def stage(config_path: str | None, overrides: Sequence[str], name: str) -> int:
    """`python -m autotraj {synthesize,sft,reward-model}`: one stage of a run's folder."""
    samples = STAGES[name].samples
    config = load(config_path, overrides)
    if name not in config.stages:
        raise UserError(f"stages = {list(config.stages)} leaves {name!r} out; add it")
    tasks, _ = preflight.check(config, sandbox=samples)
    console = Console()
    with held(RunLocation.of(config)):
        open_folder(config, only=name)
        supervised.check_inputs(name, config)
        preflight.check_last(config, {"data": tasks} if samples else {})
        if samples:
            _tell_of_template(config, console)

        from autotraj.stages.pipeline import execute_stage

        return execute_stage(name, config, console)


def _tell_of_template(config: RunConfig, console: Console) -> None:
    if note := preflight.template_note(config):
        console.print(f"note: {note}", soft_wrap=True, markup=False)


def grpo(config_path: str | None, overrides: Sequence[str], resume: str | None) -> int:
    """`python -m autotraj grpo`."""
    if resume:
        if config_path:
            raise UserError(
                "--resume takes the run's own config.toml: leave --config out, and give what changes as key=value"
            )
        location = RunLocation(resume, retry_s=RETRY_S)
        if not location.storage and not location.path.is_dir():
            raise UserError(f"--resume {resume}: there is no such folder; start a run with --config")
        with held(location):
            folder, config, checkpoint = RunFolder.resume(resume, overrides)
            return _grpo(config, folder, checkpoint)
    config = with_changes(load(config_path, overrides), preflight.GRPO_ALONE)
    tasks, _ = preflight.check(config)
    preflight.check_last(config, {"data": tasks})
    with held(RunLocation.of(config)):
        return _grpo(config, RunFolder.create(config), None)


def _grpo(config: RunConfig, folder: RunFolder, checkpoint: Checkpoint | None) -> int:
    """Train from the start, or from `checkpoint` on."""
    console = Console()
    config = with_changes(config, preflight.GRPO_ALONE)
    if checkpoint:
        if checkpoint.step >= config.grpo.num_steps and folder.location.has_model("policy"):
            console.print(
                f"already complete: step {checkpoint.step} of grpo.num_steps = {config.grpo.num_steps}; the trained "
                f"policy is {folder.location.place('policy')}. For more steps, give a larger number: "
                f"{folder.go_on} grpo.num_steps=N",
                soft_wrap=True,
            )
            return EXIT_OK
        tasks, _ = preflight.check(config)
        preflight.check_last(config, {"data": tasks})
        require_reward_model(config, checkpoint)
    console.print(f"run folder {folder.location}; sampling and training {config.model}; starting the engines …")

    from autotraj.launch import build_algorithm, export_policy, run_session, train

    try:
        with folder, graceful_interrupt() as interrupt, run_session(config) as gateway:
            algo = build_algorithm(config, gateway, trajectory_log=folder.trajectory_log)
            try:
                if checkpoint:
                    algo.restore_from_path(checkpoint.folder, learners=checkpoint.learners)
                    console.print(f"resumed at step {algo.policy_version} from {folder.location}")
                with GrpoProgress(config.grpo.num_steps, console) as view:
                    complete = train(
                        algo, folder, num_steps=config.grpo.num_steps, on_step=view.grpo_step, interrupt=interrupt
                    )
                if complete:
                    export_policy(algo, folder)
            finally:
                algo.stop()
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(folder.way_on) from interruption
    if not complete:
        console.print(
            f"interrupted, with a checkpoint; policy/ is written when all steps are done. Continue with: {folder.go_on}"
        )
        return EXIT_INTERRUPTED
    console.print(f"trained policy: {folder.location.place('policy')}")
    return EXIT_OK


def evaluate(config_path: str | None, overrides: Sequence[str], benchmarks: str | None, out: str) -> int:
    """`python -m autotraj evaluate`: engines without a learner, on a suite of `benchmarks`, whose results go to `out`, or on
    the run's own held-out problems."""
    if benchmarks:
        from autotraj.cli.benchmarks import evaluate_suite

        return evaluate_suite(config_path, overrides, benchmarks, out)
    console = Console()
    config = load(config_path, [*overrides, preflight.EVALUATION_ALONE])
    _, tasks = preflight.check(config)
    preflight.check_last(config, {"eval.data": tasks})

    from autotraj.launch import engines, evaluate_engines, run_session

    started = time.monotonic()
    with graceful_interrupt(), run_session(config) as gateway, engines(config, gateway) as pool:
        console.print(f"engines up after {time.monotonic() - started:.0f} s; {len(tasks)} problems …")
        result = evaluate_engines(config.model, pool, config, tasks)
    console.print(
        f"accuracy {result.accuracy:.1%} ± {result.accuracy_ci95:.1%} on {result.num_problems} problems, tool-call rate "
        f"{result.tool_call_rate:.0%}, mean reward {result.mean_reward:.2f}, {result.num_failed} failed, "
        f"{result.seconds:.0f} s"
    )
    for line in explain(result.groups):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return EXIT_OK


def report(run_dir: str) -> int:
    """`python -m autotraj report`."""
    from report.page import write_report

    if is_uri(run_dir):
        with scratch() as copy:  # the run may be working in its own folder
            location = RunLocation(run_dir, retry_s=RETRY_S, path=copy / "run")
            location.pull()
            Console().print(f"report: {location.place(write_report(location.path).name)}", soft_wrap=True)
            location.push()
        return EXIT_OK
    if not Path(run_dir).is_dir():
        raise UserError(f"{run_dir}: there is no run folder")
    Console().print(f"report: {write_report(Path(run_dir))}")
    return EXIT_OK


def status(run_dir: str | None) -> int:
    """`python -m autotraj status`."""
    from autotraj.status.show import show

    print(show(run_dir))
    return EXIT_OK


def _dry_run(config: RunConfig) -> int:
    """`python -m autotraj run --dry-run`: print the resolved plan. Nothing is started or written."""
    from autotraj.planning.plan import plan, render_plan

    synthesis, learns = (
        config.synthesis,
        f"{config.sft.epochs} epochs of SFT, {config.reward_model.epochs} on the pairs",
    )
    lines = [
        f"stages       {', '.join(config.stages)}",
        f"stage 1      {synthesis.num_questions} questions × {synthesis.num_candidates} candidates, up to "
        f"{len(config.repair.temperatures)} repairs of each bad one by {config.repair.repairer}; {learns}",
        render_plan(plan(config)),
    ]
    Console().print("\n".join(lines), soft_wrap=True, markup=False)
    return EXIT_OK
