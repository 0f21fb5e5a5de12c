"""`GRPOConfig`: our `RunConfig` in the clothes of an RLlib `AlgorithmConfig`."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec

from actors.config import RolloutSettings
from actors.rollout import RolloutActor
from autotraj.config import RunConfig
from cluster.roles import ROLLOUT, role
from learners.group import LearnerGroup
from tool_sandbox.config import TlsFiles
from trajectory.chat import encode, load_tokenizer, render_prompt

PROBE = (
    "Leo has 631 stamps and buys 98 bags of 4 stamps each. How many stamps does Leo have now?",
    "<think>Multiply, then add.</think>\n<code>\nprint(631+98*4)\n</code>\n<result>\n1023\n</result>\n"
    "<think>It is 1023.</think>\n<answer>\\boxed{1023}</answer>",
)
"""Question and reply that engine and learner score after every sync: all tags, words and digits."""

GATE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3}


def rollout_timeout_of(config: RunConfig) -> float:
    """Longest wait for a group: an episode's deadline twice, for queueing behind siblings, and slack."""
    return 2 * config.episode.deadline_s + 60.0


class GRPOConfig(AlgorithmConfig):
    """`GRPOConfig().run(run_config).build_algo()`. Settings of ours live in `run_config`; the rest is RLlib's."""

    run_config: RunConfig
    rollout_settings: RolloutSettings  # what `RolloutActor` reads
    trajectory_log: str | None

    def __init__(self, algo_class: type | None = None) -> None:
        if algo_class is None:
            from autotraj.grpo import GRPO  # the two classes name each other

            algo_class = GRPO
        super().__init__(algo_class=algo_class)
        self.trajectory_log = None
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
        self.run_config = run_config
        self.trajectory_log = trajectory_log
        self.rollout_settings = RolloutSettings(
            engine=run_config.engine,
            episode=run_config.episode,
            rollout=run_config.rollout,
            repair=run_config.repair,
            quality=run_config.quality,
            reward=run_config.reward,
            sandbox_address=sandbox_address,
            sandbox_token=SecretStr(sandbox_token) if sandbox_token else None,
            sandbox_tls=sandbox_tls,
            sandbox_directory=sandbox_directory,
        )
        self.debugging(seed=run_config.seed)
        self.env_runners(
            num_env_runners=run_config.rollout.num_actors,
            num_cpus_per_env_runner=run_config.rollout.num_cpus,
            num_gpus_per_env_runner=run_config.rollout.num_gpus,
            custom_resources_per_env_runner=role(ROLLOUT, by_role=run_config.place_by_role),
        )
        return self

    def build_algo(self, *args: Any, **kwargs: Any) -> Any:
        """RLlib's own. Raises ValueError without a run to build from."""
        if not hasattr(self, "run_config"):
            raise ValueError("GRPOConfig has no run to build from: call run(run_config, sandbox_address=...) first")
        return super().build_algo(*args, **kwargs)

    def training(self, **settings: Any) -> GRPOConfig:
        """Nothing of RLlib's is read here. Raises ValueError for any setting."""
        return self._refuse("training", settings, "the sections learner, loss and grpo of the RunConfig given to run()")

    def environment(self, env: Any = None, **settings: Any) -> GRPOConfig:
        """As `training`."""
        given = settings if env is None else settings | {"env": env}
        return self._refuse("environment", given, "the sections data and episode of the RunConfig given to run()")

    def _refuse(self, setter: str, settings: dict[str, Any], ours: str) -> GRPOConfig:
        if settings:
            raise ValueError(
                f"GRPOConfig.{setter}({', '.join(settings)}) would be ignored: GRPO is configured by {ours}"
            )
        return self

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
