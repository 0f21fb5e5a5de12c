"""The run's configuration. Every room owns its section; this file combines and loads them.

A configuration is a TOML file plus dotted overrides (`grpo.num_steps=20`). Everything is checked here, before any heavy
import. An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from actors.config import EngineConfig, EpisodeConfig, RepairConfig, RolloutConfig, ScorerConfig, check_rollout
from autotraj.config.stage_registry import STAGES
from autotraj.config.stages import OnlineRepairConfig, RewardModelConfig, SFTConfig, SynthesisConfig
from autotraj.errors import UserError
from cluster.config import ElasticConfig
from learners.config import LearnerConfig, LoraConfig, LossConfig
from rewards.config import QualityConfig, RewardConfig
from storage.locations import check_uri, is_uri, local_path
from tasks.config import TaskConfig
from tool_sandbox.config import SandboxConfig
from trajectory.paths import HUGGING_FACE, WORD_PROBLEMS, LocalPath
from trajectory.section import Section, Seed

SHARED: dict[tuple[str, str], tuple[str, ...]] = {
    ("engine", "model"): ("model",),
    ("engine", "adapter_rank"): ("learner", "lora", "rank"),
    ("learner", "model"): ("model",),
    ("learner", "temperature"): ("episode", "temperature"),
    ("learner", "weight_sync"): ("engine", "weight_transfer"),
    ("learner", "place_by_role"): ("place_by_role",),
    ("scorer", "place_by_role"): ("place_by_role",),
}
"""(section, key) that can't be set by itself → the key that sets it."""


S = TypeVar("S", bound=Section)


class ConfigError(UserError):
    """A configuration that can't be run. The message names the key and the remedy."""


class EvalConfig(Section):
    """How `evaluate` measures a policy, and with which tasks."""

    data: TaskConfig = TaskConfig(split="eval", limit=500)
    """The evaluation tasks. Training doesn't start if a question is in both sets."""
    num_samples: int = Field(default=1, ge=1)
    """Trajectories sampled for each question; accuracy is their mean."""

    @field_validator("data", mode="before")
    @classmethod
    def _split(cls, data: Any) -> Any:
        """A section without `split` means the split that isn't trained on, and not `data`'s default, which is `train`."""
        if not isinstance(data, dict) or "split" in data:
            return data
        source = data.get("source", WORD_PROBLEMS)
        if isinstance(source, str) and source.startswith(HUGGING_FACE):
            raise ValueError(
                f"set split, as of {source} there is none that is meant for evaluation by itself ('test'?)"
            )
        return data | {"split": "eval"}

    temperature: float = Field(default=1.0, ge=0.0)
    """Sampling temperature. 0 is greedy."""


class GRPOSettings(Section):
    """The online loop: what makes a step, how far ahead sampling may run, and every deadline."""

    num_steps: int = Field(default=100, ge=1)
    """Optimizer steps in total, including those before a resume."""
    groups_per_step: int = Field(default=16, ge=1)
    """Questions in one training step; each has `rollout.group_size` trajectories."""
    max_staleness: int = Field(default=1, ge=0)
    """How many policy versions a trajectory's oldest token may be behind the learner. 0 is strict on-policy: sampling and
    training alternate. Larger values let them overlap."""
    dynamic_sampling: bool = False
    """As in DAPO: replace groups whose rewards are all equal until the step is full. False: they count towards the step and
    make it smaller."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a prompt is sampled after failures that it didn't cause, before it is dropped with the reason."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints. The last step and an interruption also write one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of checkpoints that are kept. Older ones are deleted."""
    max_learner_restarts: int = Field(default=3, ge=0)
    """How often lost learners (a dead process, a lost node, a missed deadline) are replaced. The loop then continues from
    its newest checkpoint. An exception in a learner is a defect and ends the run. With NCCL weight sync, so does any
    loss."""
    start_timeout_s: float = Field(default=600.0, gt=0.0)
    """Longest wait for an engine or the learner group to start, seconds."""
    sync_timeout_s: float = Field(default=300.0, gt=0.0)
    """Longest wait for an engine to load new weights, seconds."""
    step_timeout_s: float = Field(default=3600.0, gt=0.0)
    """Longest time without a finished step, seconds. Then the run stops and says which part waits for what."""

    @model_validator(mode="before")
    @classmethod
    def _no_tolerance(cls, data: Any) -> Any:
        if isinstance(data, dict) and "gate_tolerance" in data:
            raise ValueError(
                "gate_tolerance is no setting any more: engines' weights are compared with the learner's exactly, and the "
                "limit for logprobs follows from the first weight sync. Delete the line"
            )
        return data


class RunConfig(Section):
    """All settings of a run."""

    model: LocalPath = Field(min_length=1)
    """Directory of the Hugging Face checkpoint to start from, or its URI, from which every node fetches a copy. A name on
    the Hugging Face hub is refused, and the error gives the command that downloads it."""
    run_dir: LocalPath = Field(default="runs/grpo", min_length=1)
    """Folder of the resolved configuration, metrics, trajectories and checkpoints: a path that all learners' nodes share, or
    a URI (`s3://bucket/runs/mine`, `gs://…`, or another that pyarrow or fsspec supports), which needs no shared file system.
    See docs/cluster.md, "Where results go"."""
    storage_retry_s: float = Field(default=120.0, ge=0.0)
    """How long a failing operation on an object of `run_dir`'s storage is tried again before the run ends, seconds."""
    gateway: str | None = None
    """Address (`host:port`) of a running sandbox gateway, whose token is `sandbox.token`. None: the run starts its own."""
    place_by_role: bool = False
    """Place learners, engines and the sandbox on nodes whose Ray resources name that role (`learner`, `rollout`,
    `sandbox`), as in the files in cluster/. False: anywhere, with the sandbox beside the driver."""
    num_gateways: int = Field(default=1, ge=1)
    """With `place_by_role`: number of sandbox nodes that the run requests from the cluster. Every sandbox node that
    exists or joins gets a gateway, also beyond this number."""
    seed: Seed = 0
    """Seed of task order, sampling and training."""
    stages: tuple[str, ...] = ("synthesize", "sft", "reward-model", "grpo")
    """The stages that `run` does, in this order. A stage that is left out is neither run nor used."""
    data: TaskConfig = TaskConfig()
    eval: EvalConfig = EvalConfig()
    engine: EngineConfig
    episode: EpisodeConfig = EpisodeConfig()
    rollout: RolloutConfig = RolloutConfig()
    elastic: ElasticConfig = ElasticConfig()
    """How the number of rollout actors follows the work."""
    sandbox: SandboxConfig = SandboxConfig()
    """The gateway that the run starts itself. To use a running one, set `gateway`."""
    reward: RewardConfig = RewardConfig()
    learner: LearnerConfig
    loss: LossConfig = LossConfig()
    grpo: GRPOSettings = GRPOSettings()
    quality: QualityConfig = QualityConfig()
    repair: RepairConfig = RepairConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    sft: SFTConfig = SFTConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    scorer: ScorerConfig = ScorerConfig()
    """The actor that serves the reward model to GRPO."""
    online_repair: OnlineRepairConfig = OnlineRepairConfig()

    @field_validator("run_dir", "model")
    @classmethod
    def _location(cls, location: str) -> str:
        if is_uri(location):
            check_uri(location)
        return location

    @field_validator("stages")
    @classmethod
    def _stages_that_there_are(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in stages if name not in STAGES]:
            raise ValueError(f"there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
        if list(stages) != [name for name in STAGES if name in stages]:
            raise ValueError(f"stages = {list(stages)}: each once, in the order {', '.join(STAGES)}")
        return stages

    @property
    def only_measures(self) -> bool:
        """Whether no stage is requested: engines sample, but nothing is trained, repaired or scored by a reward model."""
        return not self.stages

    def own_data(self, stage: str) -> Path | None:
        """The file of the user's own that a stage learns from; None if it learns from what an earlier stage makes."""
        data: str = getattr(getattr(self, STAGES[stage].learner_section, None), "data", "")
        return Path(data) if data else None

    @property
    def folder(self) -> Path:
        """The run's folder on the driver: `run_dir`, or the working folder if that is a URI."""
        return local_path(self.run_dir)

    @model_validator(mode="before")
    @classmethod
    def _hand_out_shared_values(cls, data: Any) -> Any:
        """Fill settings that two rooms need from the one key that a user sets."""
        filled = _with_adapters(data)
        if "model" not in filled:  # otherwise the sections that share it would be reported as missing, too
            raise ValueError("model: required; set it in the file or as model=VALUE")
        for (section, key), source in SHARED.items():
            inner = filled.get(section, {})
            if not isinstance(inner, dict):
                continue  # the section's own check reports what is wrong
            if key in inner:
                raise ValueError(f"{section}.{key}: set `{'.'.join(source)}` instead, which {section} shares")
            value: Any = filled
            for name in source:
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                filled[section] = inner | {key: value}
        engine, rollout = filled.get("engine", {}), filled.get("rollout", {})
        if isinstance(engine, dict) and isinstance(rollout, dict) and engine.get("device") == "gpu":
            filled["rollout"] = {"num_gpus": engine.get("tensor_parallel_size", 1)} | rollout
        return filled

    @model_validator(mode="after")
    def _no_contradictions(self) -> RunConfig:
        for name in self.stages:
            needed = STAGES[name].input
            if needed and needed.made_by not in self.stages and self.own_data(name) is None:
                raise ValueError(f"stages: {name!r} needs {needed.made_by!r}, which makes its input")
        check_rollout(self.engine, self.episode, self.rollout, self.repair)
        if "grpo" in self.stages:
            try:
                self.learner.check_call("policy_step")
            except ValueError as error:
                raise ValueError(f"learner.{error}") from error
            longest = self.episode.max_prompt_tokens + self.episode.max_response_tokens
            if self.learner.micro_batch_capacity < longest:
                sharing = self.learner.sequence_parallel_size
                shared = f" · learner.sequence_parallel_size = {sharing}" if sharing > 1 else ""
                raise ValueError(
                    f"learner.micro_batch_tokens = {self.learner.micro_batch_tokens}{shared} is less than the longest "
                    f"trajectory, episode.max_prompt_tokens + episode.max_response_tokens = {longest}, which a pass of the "
                    "learner has to hold: raise it, raise learner.sequence_parallel_size, or shorten the episode"
                )
            total, steps = self.learner.total_steps, self.grpo.num_steps
            if self.learner.schedule == "cosine" and total is not None and total < steps:
                raise ValueError(
                    f"learner.total_steps = {total} is less than grpo.num_steps = {steps}: with learner.schedule = 'cosine' "
                    f"the learning rate would be 0 from step {total + 1} on. Set learner.total_steps = {steps}"
                )
        if self.rollout.group_size < 2:
            raise ValueError("rollout.group_size must be at least 2: an advantage compares siblings")
        elastic = self.elastic
        if elastic.max_actors and not elastic.min_actors <= self.rollout.num_actors <= elastic.max_actors:
            raise ValueError(
                f"rollout.num_actors = {self.rollout.num_actors}, with which the run starts, is not between "
                f"elastic.min_actors = {elastic.min_actors} and elastic.max_actors = {elastic.max_actors}"
            )
        if self.num_gateways > 1 and not self.place_by_role:
            raise ValueError(
                f"num_gateways = {self.num_gateways} needs place_by_role = true: the gateway is beside the driver"
            )
        if self.learner.head != "lm":
            raise ValueError("learner.head: the policy's is 'lm'; the reward model's stage sets its own")
        return self


def _with_adapters(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with what follows from `learner.lora`: its rank, which engines must know, and that only adapters are sent if
    nothing else is set."""
    filled = dict(data)
    learner, engine = filled.get("learner", {}), filled.get("engine", {})
    lora = learner.get("lora") if isinstance(learner, dict) else None
    if isinstance(learner, dict) and isinstance(lora, dict) and isinstance(engine, dict):
        filled["learner"] = learner | {"lora": {"rank": LoraConfig().rank} | lora}
        filled["engine"] = {"weight_transfer": "adapter"} | engine
    return filled


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the TOML file at `path` (None: only defaults), with `key.sub=value` overrides applied."""
    return parse(_read(path, overrides))


def load_saved(path: Path) -> RunConfig:
    """The configuration that a run keeps of itself. ConfigError names the file if it is damaged."""
    try:
        return parse(read_toml(path, called="the file"))
    except ConfigError as error:
        raise ConfigError(
            f"{path}, in which the run keeps its own configuration, can't be used: restore it, or start a new run in "
            f"another run_dir\n{error}"
        ) from None


def parse(data: dict[str, Any]) -> RunConfig:
    """Validate a nested mapping. Raises `ConfigError` with one line for each problem."""
    return validated(RunConfig, data)


def with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with dotted keys set to other values, validated again. Raises ConfigError."""
    data = config.model_dump(mode="json", exclude=_shared_keys())
    for key, value in changes.items():
        _set(data, key, value, f"the change of {key!r}")
    return parse(data)


def check_key(key: str) -> None:
    """Raises ConfigError, with the nearest valid key, for a dotted key that no configuration has."""
    path = key.split(".")
    for end in range(1, len(path) + 1):
        section = _section_at(RunConfig, path[: end - 1])
        if section is not None and path[end - 1] not in section.model_fields:
            raise ConfigError(_unknown_key(RunConfig, path[:end]))


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """The keys whose values differ, as `key = value of before, not value of after`."""
    old, new = _flat(before), _flat(after)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key} = {old.get(key)!r}, not {new.get(key)!r}" for key in keys]


def _flat(config: RunConfig) -> dict[str, Any]:
    """Dotted keys and their values, without those that another key sets."""

    def walk(section: dict[str, Any], above: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in section.items():
            found |= walk(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
        return found

    return walk(config.model_dump(mode="json", exclude=_shared_keys()), "")


def _shared_keys() -> dict[str, set[str]]:
    shared: dict[str, set[str]] = {}
    for section, key in SHARED:
        shared.setdefault(section, set()).add(key)
    return shared


def load_section(section: type[S], name: str, path: str | Path | None, overrides: Sequence[str] = ()) -> S:
    """One room's section of a run's configuration, for commands that need no other."""
    data = _read(path, overrides)
    if unknown := [key for key in data if key not in RunConfig.model_fields]:
        raise ConfigError("\n".join(_unknown_key(RunConfig, [key]) for key in unknown))
    return validated(section, data.get(name, {}), within=name)


def validated(section: type[S], data: Any, *, within: str = "") -> S:
    """`data` as a section, which is called `within` in its file. Raises `ConfigError` with one line for each problem."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        lines = [_explain(section, problem, within) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def read_toml(path: str | Path, *, called: str) -> dict[str, Any]:
    """The content of a TOML file, with or without a byte order mark. `called` is the option that names the file."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{called} {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{called} {path}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"{called} {path}: it can't be read as a file: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{called} {path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{called} {path}: not valid TOML for us: it is nested too deeply") from None


def _read(path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    data = {} if path is None else read_toml(path, called="--config")
    for override in overrides:
        _apply_override(data, override)
    return data


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML that `load` reads back. Write it as UTF-8."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json", exclude=_shared_keys())))


def _without_none(section: dict[str, Any]) -> dict[str, Any]:
    """The section without keys that are None, as TOML has no null. A missing key is then None again."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value is not None
    }


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        read = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        read = {}
    value = read["value"] if len(read) == 1 else text  # on a command line, a bare string needs no quotes
    _set(data, key.strip(), value, f"override {override!r}")


def _set(data: dict[str, Any], key: str, value: Any, what: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{what}: {section} is a value, not a section")
    data[last] = value


def _explain(root: type[Section], problem: Any, within: str) -> str:
    """One line for one of pydantic's errors: the dotted key, what is wrong, and the nearest valid name."""
    # In brackets, pydantic says which member of a union it tried, or that it means a key of a mapping.
    path = [str(part) for part in problem["loc"] if "[" not in str(part)]
    key = ".".join([*([within] if within else []), *path])
    if problem["type"] == "extra_forbidden":
        return _unknown_key(root, path, within)
    if problem["type"] == "missing":
        return f"{key}: required; set it in the file or as {key}=VALUE"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "model_type":
        message = f"a section belongs here: write [{key}] with its keys below it, or {key}.KEY=VALUE"
    elif problem["type"] == "tuple_type":
        message = "a list belongs here, such as [1, 2]"
    elif problem["type"] == "string_type":
        message = f"a text belongs here; a number needs quotes to be one, on a command line '{key}=\"VALUE\"'"
    if not key:
        return message
    field = section.model_fields.get(path[-1]) if path and (section := _section_at(root, path[:-1])) else None
    shown = problem["type"] != "value_error" and (field is None or field.repr)  # a token must not be printed
    return f"{key}: {message}" + (f" (given: {problem['input']!r})" if shown else "")


def _unknown_key(root: type[Section], path: Sequence[str], within: str = "") -> str:
    section = _section_at(root, path[:-1])
    close = difflib.get_close_matches(path[-1], list(section.model_fields) if section else [], n=1)
    above = [*([within] if within else []), *path[:-1]]
    hint = f"did you mean {'.'.join([*above, close[0]])!r}?" if close else "remove it"
    return f"{'.'.join([*above, path[-1]])}: unknown key; {hint}"


def _section_at(root: type[Section], path: Sequence[str]) -> type[Section] | None:
    section = root
    for name in path:
        if name.isdigit():  # an entry of a list
            continue
        field = section.model_fields.get(name)
        candidates = [field.annotation, *get_args(field.annotation)] if field else []
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        if inner is None:
            return None
        section = inner
    return section
