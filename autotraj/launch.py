"""What every stage needs: the parts brought up in order and taken down in reverse, and training that can be interrupted.

configuration ▶ preflight ▶ run folder ▶ sandbox gateway ▶ Ray ▶ engines, learners ▶ steps … ▶ checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

from ray.rllib.env.env_runner_group import EnvRunnerGroup

from autotraj import preflight
from autotraj.config import RunConfig
from autotraj.errors import RunError, UserError
from autotraj.evaluate import EvalResult
from autotraj.evaluate import evaluate as evaluate_policy
from autotraj.grpo import GRPO
from autotraj.grpo_config import GRPOConfig
from autotraj.inspection import watch_pool
from autotraj.interrupt import Interrupt, graceful_interrupt
from autotraj.node_gateway import node_gateway
from autotraj.run_folder import RunFolder
from autotraj.runner_calls import managed
from autotraj.runner_pool import RunnerPool
from autotraj.sandbox import Gateway, sandbox_session
from cluster.session import ray_session
from learners.errors import LearnerError
from trajectory.storage import Storage
from trajectory.types import Task


def train(
    algo: GRPO,
    folder: RunFolder,
    *,
    num_steps: int,
    on_step: Callable[[int, Mapping[str, float]], None],
    interrupt: Interrupt | None = None,
) -> bool:
    """Trains up to `num_steps` optimizer steps, with checkpoints. Returns False if it was interrupted before.

    `interrupt` is the caller's, if it has one that covers more than this."""
    settings = algo.config.run_config.grpo
    saved_at = folder.last_step

    def save(driver: Path, learners: Path | Storage) -> None:
        algo.save_to_path(driver, learners=learners)

    with nullcontext(interrupt) if interrupt else graceful_interrupt() as interrupt:
        while algo.policy_version < num_steps and not interrupt.requested:
            try:
                metrics = algo.train()["grpo"]
            except LearnerError as error:
                raise RunError(f"{error}; go on from the last checkpoint with {folder.go_on}") from error
            step = algo.policy_version
            folder.write_metrics(step, metrics)
            on_step(step, metrics)
            if step % settings.checkpoint_every == 0:
                with algo.inspection.board.doing("writes a checkpoint"):
                    folder.checkpoint(step, save, keep=settings.keep_checkpoints)
                saved_at = step
        if saved_at != algo.policy_version:
            with algo.inspection.board.doing("writes a checkpoint"):
                folder.checkpoint(algo.policy_version, save, keep=settings.keep_checkpoints)
    return algo.policy_version >= num_steps


def measure(name: str, algo_or_pool: GRPO | RunnerPool, config: RunConfig, tasks: Sequence[Task]) -> EvalResult:
    """Evaluates what the engines hold now; waits until all of them hold the newest weights."""
    pool = algo_or_pool.runners if isinstance(algo_or_pool, GRPO) else algo_or_pool
    pool.wait_ready()
    # Every batch of concurrent episodes may take one episode's deadline.
    rounds = 1 + len(tasks) * config.eval.num_samples // max(1, config.rollout.max_concurrent_episodes * pool.num_ready)
    with pool.board.doing(f"evaluates {name}") if pool.board else nullcontext():
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
def parts(config: RunConfig, *, sandbox: bool = True) -> Iterator[Gateway]:
    """The sandbox, if it is needed, and Ray, up for the length of the block."""
    with ExitStack() as stack:
        if config.place_by_role:  # the gateway is an actor then
            _join(stack, config)
            yield stack.enter_context(node_gateway(config)) if sandbox else Gateway(address="")
            return
        gateway = stack.enter_context(sandbox_session(config)) if sandbox else Gateway(address="")
        _join(stack, config)
        yield gateway


def _join(stack: ExitStack, config: RunConfig) -> None:
    needs = preflight.resources(config)
    session = ray_session(num_cpus=needs.num_cpus, num_gpus=needs.num_gpus, asks=preflight.asks(config))
    try:
        stack.enter_context(session)
    except (ValueError, ConnectionError) as error:
        raise UserError(f"cluster: {error}") from error


def build(config: RunConfig, gateway: Gateway, *, trajectory_log: str | None = None) -> GRPO:
    """The algorithm, its engines and learners up and in agreement."""
    algo = (
        GRPOConfig()
        .run(config, sandbox_address=gateway.address, sandbox_token=gateway.token, trajectory_log=trajectory_log)
        .build_algo()
    )
    assert isinstance(algo, GRPO)
    return algo


@contextmanager
def engines(config: RunConfig, gateway: Gateway) -> Iterator[RunnerPool]:
    """Rollout actors alone, without a learner, up and holding `config.model`."""
    settings = GRPOConfig().run(config, sandbox_address=gateway.address, sandbox_token=gateway.token)
    group = EnvRunnerGroup(config=settings, local_env_runner=False)
    try:
        pool = RunnerPool(
            managed(group),
            start_timeout_s=config.grpo.start_timeout_s,
            sync_timeout_s=config.grpo.sync_timeout_s,
            gate_tolerance=settings.gate_tolerance,
        )
        board = watch_pool(pool, config.folder, f"engines of {config.model}")
        with closing(board):
            board.now_does("brings up engines")
            pool.start()
            pool.wait_ready()
            board.now_does("samples")
            yield pool
    finally:
        group.stop()
