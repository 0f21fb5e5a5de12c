"""`GRPOConfig`: our `RunConfig` in the clothes of an RLlib `AlgorithmConfig`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.tune.result import STDERR_FILE, STDOUT_FILE, TRIAL_INFO

from actors.config import RolloutSettings, ToolAccess
from actors.rollout import RolloutActor
from autotraj.config.run import RunConfig, check_key, with_changes
from autotraj.loop.rllib_setters import CALLBACKS, refusal, refuses_setters
from cluster.roles import ROLLOUT, role
from learners.group import LearnerGroup
from storage.locations import join
from tool_sandbox.config import TlsFiles
from trajectory.chat import encode, load_tokenizer, render_prompt
from trajectory.paths import with_absolute_paths

PROBE = (
    "Leo has 631 stamps and buys 98 bags of 4 stamps each. How many stamps does Leo have now?",
    "<think>Multiply, then add.</think>\n<code>\nprint(631+98*4)\n</code>\n<result>\n1023\n</result>\n"
    "<think>It is 1023.</think>\n<answer>\\boxed{1023}</answer>",
)
"""Question and reply that engine and learner score after every sync: all tags, words and digits."""

OURS = ("run_config", "access", "trajectory_log", "changes", "working_directory")
"""What of a `GRPOConfig` is given to a trial; all else follows from it."""

GATE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3}


def rollout_timeout_of(config: RunConfig) -> float:
    """Longest wait for a group: an episode's deadline twice, for queueing behind siblings, and slack."""
    return 2 * config.episode.deadline_s + 60.0


@refuses_setters(but={"callbacks"})
class GRPOConfig(AlgorithmConfig):
    """`GRPOConfig().run(run_config, sandbox_address=…).build_algo()`, or `param_space` of a `ray.tune.Tuner`, see `vary`.

    Settings of ours live in `run_config`. Of RLlib's own setters all but `callbacks` are refused."""

    refuses = False  # between the constructor and `freeze`, while it is a person who sets
    run_config: RunConfig
    rollout_settings: RolloutSettings  # what `RolloutActor` reads
    access: ToolAccess
    trajectory_log: str | None
    changes: dict[str, Any]
    working_directory: str  # the driver's: a Tune trial works in another

    def __init__(self, algo_class: type | None = None) -> None:
        if algo_class is None:
            from autotraj.loop.grpo import GRPO  # the two classes name each other

            algo_class = GRPO
        super().__init__(algo_class=algo_class)
        self.trajectory_log = None
        self.changes = {}
        self.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
        self.env_runners(
            env_runner_cls=RolloutActor,
            create_local_env_runner=False,
            # It would wait for their processes, while the learners' could start; `RunnerPool.start` waits, with a deadline.
            validate_env_runners_after_construction=False,
        )
        # For the same reason `GRPO.setup` makes the group of runners: RLlib's asks the first for its gym spaces.
        self._is_online = False
        self.learners(num_learners=0)  # our own group, see `build_learner_group`
        self.fault_tolerance(
            restart_failed_env_runners=True,
            # RLlib's default blocks every step for 30 s while a runner restarts.
            env_runner_health_probe_timeout_s=0.2,
        )
        self.reporting(min_time_s_per_iteration=None, min_train_timesteps_per_iteration=1)
        self._dont_auto_sync_env_runner_states = True
        self._validate_config = False  # RLlib's checks are for env, spaces and RLModule; ours ran in `RunConfig`
        self.refuses = True

    def freeze(self) -> None:
        """RLlib's own: what an algorithm is built from."""
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
        """Takes over a run's settings. `sandbox_address` is a running gateway, for the rest see `actors.config.ToolAccess`;
        `trajectory_log` a file to append to."""
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
        """RLlib's own. Raises ValueError without a run to build from, and for an environment."""
        self.environment(**({} if env is None else {"env": env}))
        self._require_run()
        return super().build_algo(**kwargs)

    def callbacks(self, callbacks_class: Any = None, **functions: Any) -> GRPOConfig:
        """RLlib's own, of the functions in `CALLBACKS`. Raises ValueError for others, and for a class of them."""
        refused = [name for name in functions if name not in CALLBACKS]
        if callbacks_class is not None:
            refused.insert(0, "callbacks_class")
        if refused:
            raise refusal("callbacks", refused)
        super().callbacks(**functions)
        return self

    # --- Tune -------------------------------------------------------------------------------------------------------

    def vary(self, changes: Mapping[str, Any]) -> GRPOConfig:
        """What differs between the trials of a `Tuner`: dotted keys of the run's configuration and their search spaces, as
        in `vary({"learner.lr": tune.grid_search([1e-4, 3e-4])})`. Raises ConfigError for a key that doesn't exist."""
        self._require_run()
        for key in changes:
            check_key(key)
        self.changes = {**self.changes, **changes}
        return self

    def to_dict(self) -> dict[str, Any]:
        """What Tune hands to each trial: of RLlib's own settings only the callbacks, as no other is read."""
        self._require_run()
        functions = {f"callbacks_{name}": getattr(self, f"callbacks_{name}") for name in CALLBACKS}
        ours = {name: getattr(self, name) for name in OURS}
        return copy.deepcopy(ours) | {name: value for name, value in functions.items() if value is not None}

    def update_from_dict(self, config_dict: Mapping[str, Any]) -> GRPOConfig:
        """Takes over what `to_dict` gave, its search spaces resolved. Local paths are read from where `run` was called.

        Raises ValueError for any other key, and ConfigError for `changes` that make no configuration."""
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
        """Of a trial: it has a run folder of its own below the configured one, and its trajectory log, if there shall be
        one, in that. Makes that folder."""
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

    @property
    def gate_tolerance(self) -> float:
        configured = self.run_config.grpo.gate_tolerance
        if configured is not None:
            return configured
        return GATE_TOLERANCE["bfloat16" if self.run_config.learner.in_bfloat16 else "float32"]

    @property
    def rollout_timeout_s(self) -> float:
        """A lease's deadline."""
        return rollout_timeout_of(self.run_config)

    def get_multi_rl_module_spec(self, **_: Any) -> MultiRLModuleSpec:
        return MultiRLModuleSpec(rl_module_specs={})

    def build_learner_group(self, **_: Any) -> LearnerGroup:
        tokenizer = load_tokenizer(self.run_config.model)
        probe = [
            *render_prompt(tokenizer, PROBE[0], self.run_config.episode.system_prompt),
            *encode(tokenizer, PROBE[1]),
        ]
        return LearnerGroup(self.run_config.learner, self.run_config.loss, probe_ids=probe)
