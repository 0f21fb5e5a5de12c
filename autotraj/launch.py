"""Starts the parts that every stage needs, in order, and ends them in reverse; and runs training that can be interrupted.

configuration ▶ preflight ▶ run folder ▶ sandbox gateway ▶ Ray ▶ engines, learners ▶ steps … ▶ checkpoint
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from autotraj.config.run import RunConfig
from autotraj.errors import NothingToLearn, OutOfMemory, RunError, UserError
from autotraj.evaluation.evaluate import EvalResult
from autotraj.evaluation.evaluate import evaluate as evaluate_policy
from autotraj.gateways.metrics import watched
from autotraj.gateways.pool import node_gateways
from autotraj.gateways.session import GatewayAccess, sandbox_session
from autotraj.interrupt import Interrupt, graceful_interrupt, taken_down_in_order
from autotraj.loop.grpo import GRPO, GRPOConfig, rollout_timeout_of
from autotraj.loop.inspection import announce, watch_pool
from autotraj.planning import preflight
from autotraj.planning.plan import memory_by_part
from autotraj.run_folder.folder import RunFolder
from autotraj.runners.calls import managed, reason
from autotraj.runners.pool import RunnerPool
from autotraj.training import supervised
from autotraj.training.replacement import Replacements
from cluster.session import ray_session
from cluster.session_watch import RayDied
from learners.errors import LearnerError
from storage.objects import Storage
from trajectory.types import Task

logger = logging.getLogger(__name__)


def train(
    algo: GRPO,
    folder: RunFolder,
    *,
    num_steps: int,
    on_step: Callable[[int, Mapping[str, float]], None],
    interrupt: Interrupt | None = None,
) -> bool:
    """Train up to `num_steps` optimizer steps, with checkpoints. Lost learners are replaced. Returns False if training was
    interrupted. It ends early, with a warning, when there is nothing left to learn from.

    `interrupt` is given by a caller whose own covers more than this function. Raises RunError; NothingToLearn, a RunError,
    if not a single step was taken."""
    settings = algo.config.run_config.grpo
    replacements = Replacements(algo.config.run_config, folder)
    folder.note(algo.learner_group.notes)

    def save(driver: Path, learners: Path | Storage) -> None:
        algo.save_to_path(driver, learners=learners)

    def checkpoint() -> None:
        algo.wait_for_gate()  # before the checkpoint, so that a gate error isn't reported as a failed write
        with algo.inspection.board.doing("writes a checkpoint"):
            folder.checkpoint(algo.policy_version, save, keep=settings.keep_checkpoints)

    with nullcontext(interrupt) if interrupt else graceful_interrupt() as interrupt, interrupt.deferred():
        asked = interrupt
        algo.stop_is_asked = lambda: asked.requested
        while True:
            try:
                if algo.policy_version >= num_steps or interrupt.requested:
                    if folder.last_step != algo.policy_version:
                        checkpoint()
                    return algo.policy_version >= num_steps
                metrics = algo.train()["grpo"]
                step = algo.policy_version
                folder.write_metrics(step, metrics)
                on_step(step, metrics)
                if step % settings.checkpoint_every == 0:
                    checkpoint()
            except supervised.Interrupted:
                continue
            except NothingToLearn as ending:
                if algo.policy_version == 0:
                    raise
                logger.warning("GRPO ends after step %d of %d: %s", algo.policy_version, num_steps, ending)
                num_steps = algo.policy_version
            except LearnerError as error:
                _replace_learners(algo, folder, error, replacements)


def _replace_learners(algo: GRPO, folder: RunFolder, error: LearnerError, replacements: Replacements) -> None:
    """Continue from the newest checkpoint with new learners, which may be lost too while they start. Raises RunError."""
    replaceable = algo.config.run_config.engine.weight_transfer != "nccl"
    while True:
        checkpoint = replacements.checkpoint_after(error, replaceable=replaceable)
        try:
            with algo.inspection.board.doing("waits for new learners"):
                algo.start_over(checkpoint)
        except LearnerError as again:
            error = again
            continue
        folder.set_back(checkpoint)
        return


def export_policy(algo: GRPO, folder: RunFolder) -> None:
    """Write the trained policy beside the checkpoints. If learners are lost, new ones load the last checkpoint."""
    replacements = Replacements(algo.config.run_config, folder)
    while True:
        try:
            supervised.export(algo.learner_group, folder.location.place("policy"))
            return
        except LearnerError as error:
            _replace_learners(algo, folder, error, replacements)


def evaluate_engines(
    name: str, algo_or_pool: GRPO | RunnerPool, config: RunConfig, tasks: Sequence[Task]
) -> EvalResult:
    """Evaluate the present weights of the engines; waits until all of them have the newest weights."""
    pool = algo_or_pool.runners if isinstance(algo_or_pool, GRPO) else algo_or_pool
    pool.wait_ready()
    # As in a rollout, all episodes of a problem may have to wait for a place.
    rounds = 1 + config.eval.num_samples // config.rollout.max_concurrent_episodes
    with pool.board.doing(f"evaluates {name}") if pool.board else nullcontext():
        return evaluate_policy(
            name,
            pool,
            tasks,
            config.eval,
            config.reward,
            seed=config.seed,
            max_concurrent_episodes=config.rollout.max_concurrent_episodes,
            call_timeout_s=rounds * rollout_timeout_of(config),
            patience_s=config.grpo.step_timeout_s,
        )


@contextmanager
def run_session(config: RunConfig, *, sandbox: bool = True) -> Iterator[GatewayAccess]:
    """Start the sandbox, if it is needed, and Ray, for the duration of the block.

    If an error from Ray ends the run, it is raised as a RunError with a plain text."""
    with _in_own_words(config), taken_down_in_order() as stack:
        if config.place_by_role:  # then the gateways are actors
            _join(stack, config)
            yield stack.enter_context(node_gateways(config)) if sandbox else GatewayAccess(address="")
            return
        gateway = stack.enter_context(sandbox_session(config)) if sandbox else GatewayAccess(address="")
        _join(stack, config)
        if sandbox:
            stack.enter_context(watched(gateway.address, gateway.token, config.sandbox.tls))
        yield gateway


@contextmanager
def _in_own_words(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except OutOfMemory as error:
        raise OutOfMemory(f"{error}\n{memory_by_part(config)}") from error
    except (RayDied, LearnerError) as error:
        raise RunError(str(error)) from error
    except ray.exceptions.RayError as error:
        raise RunError(f"Ray: {reason(error)}") from error


def _join(stack: ExitStack, config: RunConfig) -> None:
    needs = preflight.resources(config)
    session = ray_session(num_cpus=needs.num_cpus, num_gpus=needs.num_gpus, asks=preflight.asks(config))
    try:
        stack.enter_context(session)
    except (ValueError, ConnectionError) as error:
        raise UserError(f"cluster: {error}") from error
    announce(config)


def build_algorithm(config: RunConfig, gateway: GatewayAccess, *, trajectory_log: str | None = None) -> GRPO:
    """The algorithm, with engines and learners started and the gate passed."""
    algo = _settings(config, gateway, trajectory_log).build_algo()
    assert isinstance(algo, GRPO)
    try:
        gateway.wait()
    except UserError:
        algo.stop()
        raise
    return algo


def _settings(config: RunConfig, gateway: GatewayAccess, trajectory_log: str | None = None) -> GRPOConfig:
    return GRPOConfig().run(
        config,
        sandbox_address=gateway.address,
        sandbox_token=gateway.token,
        sandbox_tls=gateway.tls,
        sandbox_directory=gateway.directory,
        trajectory_log=trajectory_log,
    )


@contextmanager
def engines(config: RunConfig, gateway: GatewayAccess) -> Iterator[RunnerPool]:
    """Rollout actors without a learner, started with the weights of `config.model`."""
    # Nothing will be sent to them, so they needn't have room for an adapter, which takes time in every step.
    engine = config.engine.model_copy(update={"weight_transfer": "host"})
    config = config.model_copy(update={"engine": engine})
    settings = _settings(config, gateway)
    settings.freeze()
    group = EnvRunnerGroup(config=settings, local_env_runner=False)
    try:
        pool = RunnerPool(
            managed(group),
            start_timeout_s=config.grpo.start_timeout_s,
            sync_timeout_s=config.grpo.sync_timeout_s,
        )
        board = watch_pool(pool, config.folder, f"engines of {config.model}")
        with closing(board):
            board.now_does("brings up engines")
            pool.start()
            gateway.wait()
            pool.wait_ready()
            board.now_does("samples")
            yield pool
    finally:
        group.stop()
