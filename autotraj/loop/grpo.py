"""GRPO with tools as an RLlib algorithm: four activities that run at the same time, and one thread that never blocks.

    ledger ──lease──▶ rollout actors ──group──▶ rewards ──scored──▶ buffer ──full step──▶ learners
       ▲                    ▲                      └──bad──▶ online repair ──▶ reward model │
       │                    └────────────── weights, then the logprob gate ◀── version+1 ───┤
       └──────────────────────────────── trained, or handed back with a reason ◀────────────┘

What each part waits for: admission waits for a *trained step* (bounded staleness), the learners wait for a *full buffer*,
a runner waits for *its weights and the gate*. `training_step` checks all of them for at most a quarter of a second and
returns, so that RLlib can restore dead runners in between. With `max_staleness = 0`, admission starts exactly one step's
groups, and the same code is strictly on-policy.

It is one file because the algorithm and its configuration, `GRPOConfig`, refer to each other, as RLlib requires.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import SecretStr
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import ALL_MODULES
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.metrics import LEARNER_RESULTS, NUM_ENV_STEPS_TRAINED_LIFETIME
from ray.tune import PlacementGroupFactory
from ray.tune.result import STDERR_FILE, STDOUT_FILE, TRIAL_INFO

from actors.config import RolloutSettings, ToolAccess
from actors.rollout import RolloutActor
from actors.work import Work
from autotraj.config.run import RunConfig, check_key, with_changes
from autotraj.errors import NothingToLearn, Stalled
from autotraj.loop.inspection import Inspection
from autotraj.loop.online_repair import OnlineRepair
from autotraj.loop.refreshed_models import RefreshedModels
from autotraj.loop.reward_service import RewardModelService
from autotraj.loop.rllib_setters import CALLBACKS, refusal, refuses_setters
from autotraj.loop.saved_loop import FIRST_VERSION, STATE_FILE, SavedLoop
from autotraj.loop.scoring import Scorer
from autotraj.loop.training_batch import TrainingBatch, assemble
from autotraj.planning import preflight
from autotraj.run_folder.folder import LEARNERS, Checkpoint
from autotraj.runners.calls import CallResult, managed
from autotraj.runners.elastic import ElasticRunners
from autotraj.runners.gate import Gate, on_policy_difference
from autotraj.runners.pool import RunnerPool
from autotraj.runners.repairers import repairer_pool
from autotraj.sampling.failures import FailuresInARow
from autotraj.sampling.groups import GroupSource
from autotraj.sampling.metrics import describe_groups
from autotraj.sampling.scoring import score_group, with_own_terms
from autotraj.status.rows import LoopState
from autotraj.training.skips import Skips
from autotraj.training.supervised import Interrupted
from cluster.roles import ROLLOUT, role
from learners.advantages import has_variance
from learners.group import LearnerGroup, Pending, StepResult
from learners.skipped_steps import reasons
from rewards.own_terms import OwnTerms
from storage.locations import join
from storage.objects import Storage
from tasks.load import load_tasks
from tool_sandbox.config import TlsFiles
from trajectory import ledger as ledgers
from trajectory.chat import encode, load_tokenizer, render_prompt
from trajectory.ledger import Lease, Ledger
from trajectory.log import TrajectoryLog
from trajectory.paths import with_absolute_paths
from trajectory.types import Group, Task

POLL_S = 0.25
MAX_STEPS_ALIKE = 20
"""Number of groups in a row without varying rewards, in steps' worth, after which there is nothing left to learn from."""


PROBE = (
    "Leo has 631 stamps and buys 98 bags of 4 stamps each. How many stamps does Leo have now?",
    "<think>Multiply, then add.</think>\n<code>\nprint(631+98*4)\n</code>\n<result>\n1023\n</result>\n"
    "<think>It is 1023.</think>\n<answer>\\boxed{1023}</answer>",
)
"""Question and reply that engine and learner score after every sync. They contain all tags, words and digits."""

OURS = ("run_config", "access", "trajectory_log", "changes", "working_directory")
"""The parts of a `GRPOConfig` that are passed to a trial. Everything else is derived from them."""


def rollout_timeout_of(config: RunConfig) -> float:
    """Longest wait for a group, seconds: twice an episode's deadline, for queueing behind others, and a margin."""
    return 2 * config.episode.deadline_s + 60.0


@refuses_setters(but={"callbacks"})
class GRPOConfig(AlgorithmConfig):
    """`GRPOConfig().run(run_config, sandbox_address=…).build_algo()`, or `param_space` of a `ray.tune.Tuner`, see `vary`.

    Our own settings are in `run_config`. RLlib's own setters are refused, except `callbacks`."""

    refuses = False  # true between the constructor and `freeze`, while a user sets options
    run_config: RunConfig
    rollout_settings: RolloutSettings  # read by `RolloutActor`
    access: ToolAccess
    trajectory_log: str | None
    changes: dict[str, Any]
    working_directory: str  # the driver's; a Tune trial works in another one

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or GRPO)
        self.trajectory_log = None
        self.changes = {}
        self.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
        self.env_runners(
            env_runner_cls=RolloutActor,
            create_local_env_runner=False,
            # RLlib would wait for their processes while the learners could start. `RunnerPool.start` waits, with a deadline.
            validate_env_runners_after_construction=False,
        )
        # For the same reason `GRPO.setup` makes the group of runners: RLlib's would ask the first for its gym spaces.
        self._is_online = False
        self.learners(num_learners=0)  # we have our own group, see `build_learner_group`
        self.fault_tolerance(
            restart_failed_env_runners=True,
            # By RLlib's default, every step blocks for 30 s while a runner restarts.
            env_runner_health_probe_timeout_s=0.2,
        )
        self.reporting(min_time_s_per_iteration=None, min_train_timesteps_per_iteration=1)
        self._dont_auto_sync_env_runner_states = True
        self._validate_config = False  # RLlib's checks are for env, spaces and RLModule; ours are in `RunConfig`
        self.refuses = True

    def freeze(self) -> None:
        """RLlib's method: freezes the configuration from which an algorithm is built."""
        if self.refuses:
            self.refuses = False
        super().freeze()

    def run(
        self,
        run_config: RunConfig,
        *,
        sandbox_address: str,
        sandbox_token: str | None = None,
        sandbox_tls: TlsFiles | None = None,
        sandbox_directory: str = "",
        trajectory_log: str | None = None,
    ) -> GRPOConfig:
        """Set a run's settings. `sandbox_address` is a running gateway; for the others see `actors.config.ToolAccess`.
        `trajectory_log` is a file to append to."""
        self.trajectory_log = trajectory_log
        self.working_directory = str(Path.cwd())
        self.access = ToolAccess(
            sandbox_address=sandbox_address,
            sandbox_token=SecretStr(sandbox_token) if sandbox_token else None,
            sandbox_tls=sandbox_tls,
            sandbox_directory=sandbox_directory,
        )
        return self._take(run_config)

    def _take(self, run_config: RunConfig) -> GRPOConfig:
        self.run_config = run_config
        self.rollout_settings = RolloutSettings(
            engine=run_config.engine,
            episode=run_config.episode,
            rollout=run_config.rollout,
            repair=run_config.repair,
            quality=run_config.quality,
            reward=run_config.reward,
            **{name: getattr(self.access, name) for name in ToolAccess.model_fields},
        )
        super().debugging(seed=run_config.seed)
        super().env_runners(
            num_env_runners=run_config.rollout.num_actors,
            num_cpus_per_env_runner=run_config.rollout.num_cpus,
            num_gpus_per_env_runner=run_config.rollout.num_gpus,
            custom_resources_per_env_runner=role(ROLLOUT, by_role=run_config.place_by_role),
        )
        return self

    def build_algo(self, env: Any = None, **kwargs: Any) -> Any:
        """RLlib's method. Raises ValueError if `run` wasn't called, and for an environment."""
        self.environment(**({} if env is None else {"env": env}))
        self._require_run()
        return super().build_algo(**kwargs)

    def callbacks(self, callbacks_class: Any = None, **functions: Any) -> GRPOConfig:
        """RLlib's setter, for the functions in `CALLBACKS`. Raises ValueError for others, and for a class of callbacks."""
        refused = [name for name in functions if name not in CALLBACKS]
        if callbacks_class is not None:
            refused.insert(0, "callbacks_class")
        if refused:
            raise refusal("callbacks", refused)
        super().callbacks(**functions)
        return self

    # --- Tune -------------------------------------------------------------------------------------------------------

    def vary(self, changes: Mapping[str, Any]) -> GRPOConfig:
        """Set the differences between the trials of a `Tuner`: dotted keys of the run's configuration and their search
        spaces, as in `vary({"learner.lr": tune.grid_search([1e-4, 3e-4])})`. Raises ConfigError for a key that doesn't
        exist."""
        self._require_run()
        for key in changes:
            check_key(key)
        self.changes = {**self.changes, **changes}
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings that Tune passes to each trial. Of RLlib's own there are only the callbacks, as no other is read."""
        self._require_run()
        functions = {f"callbacks_{name}": getattr(self, f"callbacks_{name}") for name in CALLBACKS}
        ours = {name: getattr(self, name) for name in OURS}
        return copy.deepcopy(ours) | {name: value for name, value in functions.items() if value is not None}

    def update_from_dict(self, config_dict: Mapping[str, Any]) -> GRPOConfig:
        """Take over a result of `to_dict`, with its search spaces resolved. Local paths are read from where `run` was
        called.

        Raises ValueError for any other key, and ConfigError for `changes` that don't make a valid configuration."""
        given = {name: value for name, value in config_dict.items() if name != TRIAL_INFO}
        known = {*OURS, *(f"callbacks_{name}" for name in CALLBACKS), STDOUT_FILE, STDERR_FILE}
        if unknown := [name for name in given if name not in known]:
            raise ValueError(
                f"{', '.join(map(repr, unknown))}: not read by GRPO, so it would be ignored; what a trial is to have of its "
                "own is given to GRPOConfig.vary, by its key in the run's configuration"
            )
        for name, value in given.items():
            setattr(self, name, value)
        if not hasattr(self, "run_config"):
            return self
        run = with_changes(self.run_config, self.changes) if self.changes else self.run_config
        self.changes = {}
        base = Path(self.working_directory)
        self.access = with_absolute_paths(self.access, base)
        if self.trajectory_log:
            self.trajectory_log = str(base / self.trajectory_log)
        return self._take(with_absolute_paths(run, base))

    def for_trial(self, name: str) -> GRPOConfig:
        """The configuration of a trial, which has a run folder of its own below the configured one, and its trajectory log
        there, if there is to be one. Makes that folder."""
        own: GRPOConfig = self.copy(copy_frozen=False)
        own._take(self.run_config.model_copy(update={"run_dir": join(self.run_config.run_dir, name)}))
        if own.trajectory_log:
            own.trajectory_log = str(own.run_config.folder / Path(own.trajectory_log).name)
        own.run_config.folder.mkdir(parents=True, exist_ok=True)
        own.freeze()
        return own

    def _require_run(self) -> None:
        if not hasattr(self, "run_config"):
            raise ValueError("GRPOConfig has no run to build from: call run(run_config, sandbox_address=...) first")

    def make_gate(self) -> Gate:
        """A gate for the coarser of the learner's and the engines' dtypes."""
        run = self.run_config
        exact = run.engine.weights_dtype == "float32" and not run.learner.in_bfloat16
        return Gate("float32" if exact else "bfloat16")

    @property
    def rollout_timeout_s(self) -> float:
        """The deadline of a lease, seconds."""
        return rollout_timeout_of(self.run_config)

    def get_multi_rl_module_spec(self, **_: Any) -> MultiRLModuleSpec:
        return MultiRLModuleSpec(rl_module_specs={})

    def build_learner_group(self, **_: Any) -> LearnerGroup:
        tokenizer = load_tokenizer(self.run_config.model)
        probe = [
            *render_prompt(tokenizer, PROBE[0], self.run_config.episode.system_prompt),
            *encode(tokenizer, PROBE[1]),
        ]
        run = self.run_config
        return LearnerGroup(run.learner, run.loss, probe_ids=probe, publish_as=run.engine.weights_dtype)


class GRPO(Algorithm):
    """`GRPOConfig().run(run_config).build_algo()`; one `train()` is one optimizer step."""

    config: GRPOConfig
    learner_group: LearnerGroup

    @classmethod
    def get_default_config(cls) -> GRPOConfig:
        return GRPOConfig()

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """The resources that a Tune trial reserves: those of all actors of the run, and none for the trial's own process,
        which only waits.

        Raises what `GRPOConfig.update_from_dict` does."""
        run = cls.get_default_config().update_from_dict(config).run_config
        bundles = [dict(ask.resources) for ask in preflight.asks_of_grpo(run) for _ in range(ask.count)]
        return PlacementGroupFactory([{}, *bundles], strategy=run.learner.placement_strategy)

    # --- coming up --------------------------------------------------------------------------------------------------

    def setup(self, config: GRPOConfig) -> None:
        if self._storage is not None:  # Tune's storage, which gives each trial a name
            self.config = config = config.for_trial(self._storage.trial_dir_name)
        run = config.run_config
        self._tasks: list[Task] = load_tasks(run.data)
        self.models = RefreshedModels(run)
        self._pending: tuple[Pending[StepResult], TrainingBatch, float] | None = None
        self._service: RewardModelService | None = None
        self._scorer: Scorer | None = None
        self._repair: OnlineRepair | None = None
        self._ends_with_the_run = ExitStack()
        self._own_terms = OwnTerms(run.reward)
        self._ends_with_the_run.callback(self._own_terms.close)
        preflight.check_terms(self._own_terms)
        self._num_leases = 0
        self._skips = Skips()
        self._num_alike = 0  # groups in a row without variance
        self._failures = FailuresInARow("GRPO", (run.grpo.max_staleness + 1) * run.grpo.groups_per_step)
        self.stop_is_asked: Callable[[], bool] = lambda: False  # set by `train`, which then gets `Interrupted`
        self._last_step_at = time.monotonic()
        self.policy_version = 0
        self.step_metrics: dict[str, float] = {}
        self._log = TrajectoryLog(config.trajectory_log) if config.trajectory_log else None
        super().setup(config)  # creates the learner group but doesn't start it
        self.env_runner_group = EnvRunnerGroup(config=config, local_env_runner=False)
        self._gate = config.make_gate()
        self.runners = RunnerPool(
            managed(self.env_runner_group),
            start_timeout_s=run.grpo.start_timeout_s,
            sync_timeout_s=run.grpo.sync_timeout_s,
            gate=self._gate,
        )
        if run.engine.weight_transfer == "nccl":
            self.runners.use_broadcast(
                self.learner_group,
                workers_per_engine=run.engine.tensor_parallel_size,
                learners_train=lambda: self._pending is not None,
            )
        self._elastic: ElasticRunners | None = None
        if run.elastic.max_actors:
            self._elastic = ElasticRunners(run.elastic, self.env_runner_group, self.runners, run.folder)
        self.repairers = self.runners  # replaced if there are repair actors
        self._begin()
        self.inspection = Inspection(self, run.folder)
        self.inspection.board.now_does("brings up learners and engines")
        self.runners.start()  # in the background, while the learners start
        self._bring_up_scoring(config)
        self.learner_group.start()
        self._publish()  # the gate must also be passed before the first token
        self.inspection.board.now_does("trains")

    def _begin(self) -> None:
        """Set the state of the start, in which nothing was worked on yet."""
        run = self.config.run_config
        self.ledger = Ledger(self._tasks, seed=run.seed, max_attempts=run.grpo.max_attempts)
        self.buffer: list[Group] = []  # scored groups, in order of arrival
        self._source = GroupSource(
            self.ledger,
            self.runners,
            self._score,
            failures=self._failures,
            seed_of=self._seed_of,
            timeout_s=self.config.rollout_timeout_s,
        )
        self._tokens_at_step = 0  # the source's count at the end of the last step

    def _seed_of(self, lease: Lease) -> int:
        """A different seed for every lease of the run, also if a task is sampled again."""
        self._num_leases += 1
        return self.config.run_config.seed * 1_000_003 + self._num_leases

    def _bring_up_scoring(self, config: GRPOConfig) -> None:
        run = config.run_config
        if not run.reward_model.path:
            return
        self._service = RewardModelService(run.scorer, run.reward_model.path)
        self._service.start()
        required = run.reward_model.when_unavailable == "drop"
        self._scorer = Scorer(run.reward, self._service, mask_results=run.scorer.mask_results, required=required)
        if run.online_repair.enabled:
            repairers = repairer_pool(run, config.rollout_settings, self.runners)
            self.repairers = self._ends_with_the_run.enter_context(repairers)
            self._repair = OnlineRepair(run, self.repairers, self._service, self.models)

    def _publish(self) -> None:
        """Publish the learners' weights to the engines and wait until the first one has them."""
        current = self.learner_group.publish()
        assert current.probe is not None, "the learner group was made with a probe"
        assert current.checksums is not None, "it was published just now"
        self.policy_version = current.policy_version
        self.runners.push(current.update, current.probe, current.checksums)
        self.runners.wait_ready(everyone=False)
        self.inspection.counts_from_here()
        self._last_step_at = time.monotonic()

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def training_step(self) -> None:
        if self._elastic:
            self._elastic.watch(learners_wait=self._pending is None)
        self._source.admit(self.num_admissible())
        self._begin_step()
        self._stop_if_asked()
        outcomes = self.runners.poll(POLL_S, self._pending[0].refs if self._pending else [])
        if self.repairers is not self.runners:
            outcomes += self.repairers.poll(0.0)
        for outcome in outcomes:
            self._take(outcome)
        for group in self._source.collect():
            self._keep(group)
        if self._pending and (result := self._pending[0].poll()) is not None:
            self._finish_step(result, *self._pending[1:])
        self._check_variance()
        self._source.check(busy=self._pending is not None)
        self._check_deadlines()

    def _stop_if_asked(self) -> None:
        """Raises Interrupted if a user asked to stop and no step is being trained; none could begin just now.

        It doesn't wait for groups that are being sampled, since they may be dropped and their step may never come."""
        if self._pending is None and self.stop_is_asked():
            raise Interrupted

    def num_admissible(self) -> int:
        """How many groups may start now according to the staleness bound."""
        settings, counts = self.config.run_config.grpo, self.ledger.counts()
        return ledgers.admissible(
            leased=counts.leased,
            finished=counts.finished + counts.scored,
            trained=counts.trained,
            version=self.policy_version,
            groups_per_step=settings.groups_per_step,
            max_staleness=settings.max_staleness,
        )

    def _take(self, outcome: CallResult) -> None:
        if outcome.method == Work.REPAIR:
            assert self._repair is not None
            self._repair.take(outcome)
        else:
            self._source.take(outcome)

    def _score(self, group: Group) -> Group:
        scored = self._scorer.score(group) if self._scorer else score_group(group, self.config.run_config.reward)
        return with_own_terms(scored, self._own_terms)

    def _keep(self, group: Group) -> None:
        """Put a scored group into the buffer, unless there is nothing to learn from it."""
        if self._repair:
            self._repair.offer(group)
        if self._log:
            self._log.append(group)
        varied = has_variance(np.array([r.total for r in group.rewards]))
        self._num_alike = 0 if varied else self._num_alike + 1
        if self.config.run_config.grpo.dynamic_sampling and not varied:
            self.ledger.drop(group.lease_id, "no_variance")
        else:
            self.buffer.append(group)

    def _begin_step(self) -> None:
        """Remove stale groups, and give a full step to the learners if they are free."""
        run = self.config.run_config
        if self._pending or self.runners.broadcasting or len(self.buffer) < run.grpo.groups_per_step:
            return
        fresh = []
        for group in self.buffer:
            sampled_by = group.min_policy_version
            if sampled_by is not None and ledgers.is_stale(sampled_by, self.policy_version, run.grpo.max_staleness):
                self.ledger.hand_back(group.lease_id, "stale")
            else:
                fresh.append(group)
        # Oldest first. Otherwise groups that a long tool call delayed would be overtaken until they are too stale.
        fresh.sort(key=lambda g: g.min_policy_version or 0)
        self.buffer = fresh
        if len(fresh) < run.grpo.groups_per_step:
            return
        taken, self.buffer = fresh[: run.grpo.groups_per_step], fresh[run.grpo.groups_per_step :]
        batch = assemble(taken, run.loss, self.policy_version)
        if not batch.has_gradient:  # nothing to learn from, so there is no step, and admission replaces the groups
            for group in taken:
                self.ledger.drop(group.lease_id, "no_variance")
            return
        self._pending = (self.learner_group.start_step(batch.samples), batch, time.monotonic())

    def _finish_step(self, result: StepResult, batch: TrainingBatch, started: float) -> None:
        """Count the step, publish the weights and report. Runners sync while the next step begins."""
        self._pending = None
        now = time.monotonic()
        if not result.applied:
            self._skip_step(result, batch)
            return
        self._skips.took(result.metrics)
        metrics = describe_groups(batch.groups, self.policy_version)
        self.policy_version = result.policy_version
        self.ledger.train([group.lease_id for group in batch.groups], step=self.policy_version)
        assert result.probe is not None, "the learner group was made with a probe"
        assert result.checksums is not None, "an applied step publishes"
        self._gate.check_sampled(on_policy_difference(result.metrics))
        self.runners.push(result.update, result.probe, result.checksums)
        if self._repair:
            self._repair.on_step(self.policy_version)
        if self._elastic:
            self._elastic.on_step(self.policy_version)
        elapsed = now - self._last_step_at
        self.step_metrics = metrics | {
            "step": float(self.policy_version),
            "step_seconds": elapsed,
            "train_seconds": now - started,
            "tokens_per_second": (self._source.num_tokens - self._tokens_at_step) / elapsed,
            "groups_no_variance": float(batch.num_no_variance),
            **self._skips.metrics(),
            **self.inspection.measured(result),
        }
        self._tokens_at_step, self._last_step_at = self._source.num_tokens, now
        self.inspection.stepped(batch.groups, self.step_metrics)
        # RLlib ends the iteration at the first trained timestep (`min_train_timesteps_per_iteration = 1`).
        self.metrics.log_value(
            (LEARNER_RESULTS, ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME),
            int(metrics["num_trajectories"]),
            reduce="lifetime_sum",
        )

    def _skip_step(self, result: StepResult, batch: TrainingBatch) -> None:
        """Handle a step whose loss or gradient was not finite. Nothing has changed, and its prompts are sampled again."""
        (reason, *_) = reasons(result.metrics)
        for group in batch.groups:
            self.ledger.hand_back(group.lease_id, reason)
        self._last_step_at = time.monotonic()
        self._skips.took(result.metrics)

    def _check_variance(self) -> None:
        """Raises NothingToLearn if there are only groups without variance, which can't make a step."""
        run = self.config.run_config
        makes_steps = run.loss.kl_coef > 0 and not run.grpo.dynamic_sampling
        if makes_steps or self._pending or self._num_alike < MAX_STEPS_ALIKE * run.grpo.groups_per_step:
            return
        raise NothingToLearn(
            f"nothing left to learn from: the rewards of the last {self._num_alike} groups did not vary within a group, so "
            "they have no advantage. The policy solves all of these prompts or none, or episode.temperature is too low for "
            "siblings to differ"
        )

    def _check_deadlines(self) -> None:
        limit = self.config.run_config.grpo.step_timeout_s
        waited = time.monotonic() - self._last_step_at
        if waited > limit:
            raise Stalled(
                f"no step finished for {waited:.0f} s (grpo.step_timeout_s = {limit:.0f}): {self.inspection.waiting()}"
            )

    # --- what it shows of itself (`inspection.LoopView`) ----------------------------------------------------------------

    def loop_state(self) -> LoopState:
        """The state of the loop, with the losses since the last step."""
        settings = self.config.run_config.grpo
        return LoopState(
            step=self.policy_version,
            groups_per_step=settings.groups_per_step,
            max_staleness=settings.max_staleness,
            num_buffered=len(self.buffer),
            num_scoring=self._source.num_scoring,
            num_admissible=self.num_admissible(),
            learners_up=self.runners.has_weights,
            trains=self._pending is not None,
            broadcasts=self.runners.broadcasting,
            uses_reward_model=self._service is not None,
            num_repairs=self.repairers.num_in_flight(Work.REPAIR) if self._repair else None,
            runners=self.runners.views(),
        )

    def scoring_metrics(self) -> dict[str, float]:
        """Metrics of the reward model and of online repair."""
        metrics = self._scorer.metrics() if self._scorer else {}
        return metrics | (self._repair.metrics() if self._repair else {})

    def title(self) -> str:
        """A description of this run in one line."""
        run = self.config.run_config
        return f"GRPO of {run.model}, step {self.policy_version} of {run.grpo.num_steps}"

    def step(self) -> dict[str, Any]:
        results: dict[str, Any] = super().step()
        results["grpo"] = dict(self.step_metrics)
        results["done"] = self.policy_version >= self.config.run_config.grpo.num_steps  # with this, Tune ends the trial
        return results

    def restore_env_runners(self, env_runner_group: EnvRunnerGroup) -> list[int]:
        # RLlib's method would ask a learner for an RLModule state, which ours doesn't have; weights are pushed instead.
        if self.repairers is not self.runners:
            self.repairers.restore()
        return self.runners.restore()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        return []  # the learners' ranks write their own part, perhaps elsewhere

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        return {"training_iteration": self.training_iteration}

    def set_state(self, state: dict[str, Any]) -> None:
        self._iteration = state["training_iteration"]

    def save_to_path(self, path: Any = None, *, learners: Path | Storage | None = None, **kwargs: Any) -> str:
        """Write ledger and scored but untrained groups below `path`, and the learners' state at `learners` (None: below
        `path`). Only between steps, when none is being trained. Waits until an engine has passed the gate with the weights,
        since a run must not continue from weights that the gate would refuse."""
        assert self._pending is None, "a checkpoint is taken between steps"
        self.wait_for_gate()
        # RLlib would take a path without a scheme for an invalid URI.
        target: str = super().save_to_path(str(Path(path).absolute()) if path else None, **kwargs)
        saved = SavedLoop(
            ledger=self.ledger.state(),
            buffer=self.buffer,
            num_leases=self._num_leases,
            scorer=self._scorer.state() if self._scorer else None,
            repair=self._repair.state() if self._repair else None,
        )
        Path(target, STATE_FILE).write_bytes(saved.to_bytes())
        if self._repair and not self.models.is_counted(Path(target)):
            self._repair.pin()
        self.learner_group.save_to_path(learners or Path(target) / LEARNERS)
        return target

    def wait_for_gate(self) -> None:
        """Wait until an engine has the newest weights. Raises GateError, or Stalled after `grpo.start_timeout_s`."""
        limit = self.config.run_config.grpo.start_timeout_s  # a dead engine may have to start again
        deadline = time.monotonic() + limit
        while not self.runners.num_ready:
            if time.monotonic() > deadline:
                raise Stalled(
                    f"no engine has taken the weights of step {self.policy_version} within {limit:.0f} s, so no checkpoint "
                    f"of them is written: {self.runners.describe()}"
                )
            self.runners.restore()
            for outcome in self.runners.poll(POLL_S):
                self._take(outcome)

    def restore_from_path(self, path: Any, *args: Any, learners: Path | Storage | None = None, **kwargs: Any) -> None:
        # This skips RLlib's `Algorithm`, whose version pushes connector states and RLModule weights, which we don't have.
        path = str(Path(path).absolute())
        super(Algorithm, self).restore_from_path(path, *args, **kwargs)
        self.learner_group.restore_from_path(learners or Path(path) / LEARNERS)
        saved = SavedLoop.from_bytes(Path(path, STATE_FILE).read_bytes())
        self.buffer = list(saved.buffer)
        self.ledger.restore(saved.ledger, held=[group.lease_id for group in self.buffer])  # all others are leased again
        # This counter never goes back, as seeds are made from it: tasks that are sampled again must get other samples.
        self._num_leases = max(self._num_leases, saved.num_leases)
        self._set_back_scoring(saved.scorer, saved.repair)
        self._publish()

    def _set_back_scoring(self, scorer: dict[str, Any] | None, repair: dict[str, Any] | None) -> None:
        """Set scoring and repair back to those states; None: as at the start. Repair comes first, as it may be about to give
        the service a newer model.

        Raises UserError if the reward model of that time is gone, or RunError."""
        if self._repair:
            self._repair.restore(repair)
        if self._scorer:
            version = scorer["version"] if scorer else FIRST_VERSION
            self._scorer.restore(scorer, self.models.find(version, scorer["path"] if scorer else ""))

    def start_over(self, checkpoint: Checkpoint | None) -> None:
        """Replace lost learners by new ones, and set everything back to `checkpoint`, or to the start.

        Groups that are being sampled come from a policy that is gone: they are cancelled, and their tasks are leased again.
        Raises LearnerError if the new learners don't start within `learner.start_timeout_s`."""
        self._pending = None
        self.runners.forget(Work.ROLLOUT)
        self._source.close()
        self._begin()
        self.learner_group.recreate()
        if checkpoint is not None:
            self.restore_from_path(checkpoint.folder, learners=checkpoint.learners)
            return
        self._set_back_scoring(None, None)
        self._publish()

    def cleanup(self) -> None:
        self.inspection.board.close()
        self._source.close()
        if self._repair:
            self._repair.close()
        self._ends_with_the_run.close()
        if self._service:
            self._service.stop()
        if self._log:
            self._log.close()
        super().cleanup()
