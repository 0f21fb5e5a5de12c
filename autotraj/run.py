"""The commands `grpo` and `evaluate`: bring the parts up in order, run, take them down in reverse.

configuration ▶ preflight ▶ run folder ▶ sandbox gateway ▶ Ray ▶ algorithm ▶ steps … ▶ checkpoint
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from autotraj import preflight
from autotraj.config import RunConfig, load
from autotraj.errors import RunError
from autotraj.evaluate import EvalResult
from autotraj.evaluate import evaluate as evaluate_policy
from autotraj.grpo import GRPO
from autotraj.grpo_config import GRPOConfig
from autotraj.progress import ProgressView
from autotraj.run_folder import RunFolder
from autotraj.runner_pool import RunnerPool
from autotraj.sandbox import Gateway, sandbox_session
from cluster.session import ray_session
from learners.errors import LearnerError
from trajectory.types import Task

EXIT_OK, EXIT_INTERRUPTED = 0, 130


@dataclass(slots=True)
class Interrupt:
    """Set by the first Ctrl-C or SIGTERM: finish the step, write a checkpoint, stop. The second one raises."""

    requested: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step, with a checkpoint; again to stop at once", flush=True)


@contextmanager
def graceful_interrupt() -> Iterator[Interrupt]:
    """Turns SIGINT and SIGTERM into a request for the length of the block."""
    interrupt = Interrupt()
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    algo: GRPO, folder: RunFolder, *, num_steps: int, on_step: Callable[[int, Mapping[str, float]], None]
) -> bool:
    """Trains up to `num_steps` optimizer steps, with checkpoints. Returns False if it was interrupted before."""
    settings = algo.config.run_config.grpo
    saved_at = -1
    with graceful_interrupt() as interrupt:
        while algo.policy_version < num_steps and not interrupt.requested:
            try:
                metrics = algo.train()["grpo"]
            except LearnerError as error:
                raise RunError(f"{error}; continue from the last checkpoint with --resume {folder.path}") from error
            step = algo.policy_version
            folder.write_metrics(step, metrics)
            on_step(step, metrics)
            if step % settings.checkpoint_every == 0:
                folder.checkpoint(step, algo.save_to_path, keep=settings.keep_checkpoints)
                saved_at = step
        if saved_at != algo.policy_version:
            folder.checkpoint(algo.policy_version, algo.save_to_path, keep=settings.keep_checkpoints)
    return algo.policy_version >= num_steps


def measure(name: str, algo_or_pool: GRPO | RunnerPool, config: RunConfig, tasks: Sequence[Task]) -> EvalResult:
    """Evaluates what the engines hold now; waits until all of them hold the newest weights."""
    pool = algo_or_pool.runners if isinstance(algo_or_pool, GRPO) else algo_or_pool
    pool.wait_ready()
    # Every batch of concurrent episodes may take one episode's deadline.
    rounds = 1 + len(tasks) * config.eval.num_samples // max(1, config.rollout.max_concurrent_episodes * pool.num_ready)
    return evaluate_policy(
        name,
        pool,
        tasks,
        config.eval,
        config.reward,
        seed=config.seed,
        timeout_s=(1 + rounds) * config.episode.deadline_s,
    )


@contextmanager
def parts(config: RunConfig) -> Iterator[Gateway]:
    """The sandbox and Ray, up for the length of the block."""
    needs = preflight.resources(config)
    with ExitStack() as stack:
        gateway = stack.enter_context(sandbox_session(config))
        stack.enter_context(ray_session(num_cpus=needs.num_cpus, num_gpus=needs.num_gpus))
        yield gateway


def build(config: RunConfig, gateway: Gateway, *, trajectory_log: str | None = None) -> GRPO:
    """The algorithm, its engines and learners up and in agreement."""
    algo = (
        GRPOConfig()
        .run(config, sandbox_address=gateway.address, sandbox_token=gateway.token, trajectory_log=trajectory_log)
        .build_algo()
    )
    assert isinstance(algo, GRPO)
    return algo


def grpo(config_path: str | None, overrides: Sequence[str], *, resume: str | None) -> int:
    """`python -m autotraj grpo`."""
    console = Console()
    if resume:
        folder, config, checkpoint = RunFolder.resume(Path(resume))
    else:
        config, checkpoint = load(config_path, overrides), None
    preflight.check(config)
    if not resume:
        folder = RunFolder.create(config)
    console.print(f"run folder {folder.path}; sampling and training {config.model}; starting the engines …")
    with folder, parts(config) as gateway:
        algo = build(config, gateway, trajectory_log=folder.trajectory_log)
        try:
            if checkpoint:
                algo.restore_from_path(str(checkpoint.resolve()))
                console.print(f"resumed at step {algo.policy_version} from {checkpoint}")
            with ProgressView(config.grpo.num_steps, console=console) as view:
                complete = train(algo, folder, num_steps=config.grpo.num_steps, on_step=view.step)
            if complete:
                algo.learner_group.export_hf(str((folder.path / "policy").resolve()))
        finally:
            algo.stop()
    if not complete:
        console.print(f"interrupted; continue with: python -m autotraj grpo --resume {folder.path}")
        return EXIT_INTERRUPTED
    console.print(f"trained policy: {folder.path / 'policy'}")
    return EXIT_OK


def evaluate(config_path: str | None, overrides: Sequence[str]) -> int:
    """`python -m autotraj evaluate`: engines only, no learner."""
    from ray.rllib.env.env_runner_group import EnvRunnerGroup

    console = Console()
    config = load(config_path, overrides)
    _, tasks = preflight.check(config)
    started = time.monotonic()
    with parts(config) as gateway:
        settings = GRPOConfig().run(config, sandbox_address=gateway.address, sandbox_token=gateway.token)
        group = EnvRunnerGroup(config=settings, local_env_runner=False)
        try:
            pool = RunnerPool(
                group,
                start_timeout_s=config.grpo.start_timeout_s,
                sync_timeout_s=config.grpo.sync_timeout_s,
                gate_tolerance=settings.gate_tolerance,
            )
            pool.start()
            pool.wait_ready()
            console.print(f"engines up after {time.monotonic() - started:.0f} s; {len(tasks)} problems …")
            result = measure(config.model, pool, config, tasks)
        finally:
            group.stop()
    console.print(
        f"accuracy {result.accuracy:.1%} ± {result.accuracy_ci95:.1%} on {result.num_problems} problems, tool-call rate "
        f"{result.tool_call_rate:.0%}, mean reward {result.mean_reward:.2f}, {result.num_failed} failed, "
        f"{result.seconds:.0f} s"
    )
    return EXIT_OK
