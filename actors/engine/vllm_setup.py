"""Sets up vLLM: its environment and its arguments, with the reason for each that isn't the default."""

from __future__ import annotations

import os
import warnings
from typing import Any

from actors.config import EngineConfig
from actors.engine import adapter

TORCH_NOISE = "`torch.distributed.reduce_op` is deprecated"
"""A warning that torch 2.13 prints whenever vllm 0.32 is imported."""


def set_environment(config: EngineConfig) -> None:
    """Set the variables that vLLM reads, in this process and in those that it starts. Call it before vLLM's import."""
    values = {
        # At WARNING, a start on CPU alone logs a dozen messages that a user can't act on.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads (gRPC, Ray) that don't survive a fork
        "HF_HUB_OFFLINE": "1",  # models are local folders
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", f"ignore:{TORCH_NOISE}:FutureWarning"),
    }
    if config.device == "cpu":
        values |= {
            "VLLM_CPU_KVCACHE_SPACE": str(config.cpu_kv_cache_gib),
            # The scheduler must place threads: with pinning, several engines would all be bound to the same first cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(config.cpu_threads),
            # Without this, vLLM's CPU platform runs the worker in a third process, to set OpenMP's environment there,
            # which is already set here. `AsyncLLM` keeps its core process in any case. This saves a third of the start
            # (vllm 0.32).
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        if config.enforce_eager is not False:
            # Even an eager engine compiles the function that ranks logprobs: at its first requests, again for other batch
            # sizes, and where nothing is cached with a C++ compiler. Uncompiled, it gives the same integers (vllm 0.32).
            values["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.update(values)
    warnings.filterwarnings("ignore", message=TORCH_NOISE, category=FutureWarning)


def start_engine(config: EngineConfig, seed: int) -> Any:
    """An `AsyncLLM` with its core process started and the model loaded. Blocks for half a minute. Any thread may call it."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from actors.engine.processes import TensorParallelExecutor

    on_cpu, alone = config.device == "cpu", config.tensor_parallel_size == 1
    arguments = AsyncEngineArgs(
        model=config.model,
        dtype=config.weights_dtype,
        seed=seed,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        block_size=config.block_size,
        enforce_eager=on_cpu if config.enforce_eager is None else config.enforce_eager,
        enable_prefix_caching=True,
        # A prompt that is split over two steps rewinds its request's generator, which torch's CPU generators can't do.
        # With a seed for each request that ends the core process (vllm 0.32: "CPU Generator does not use offset").
        enable_chunked_prefill=not on_cpu,
        max_num_batched_tokens=max(2048, config.max_model_len) if on_cpu else None,
        # With one device, the core process does the work itself instead of starting one more process.
        distributed_executor_backend="uni" if alone else "mp",
        logprobs_mode="processed_logprobs",  # those of the distribution that is sampled from, temperature included
        weight_transfer_config=WeightTransferConfig(backend="nccl" if config.weight_transfer == "nccl" else "host"),
        **_adapters(config),
        worker_extension_cls="actors.engine.weight_transfer.WorkerExtension",
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    # Not `from_engine_args`: that takes no executor, and by the arguments' own backend vLLM decides more than its executor.
    return AsyncLLM(
        arguments.create_engine_config(UsageContext.ENGINE_CONTEXT),
        UniProcExecutor if alone else TensorParallelExecutor,
        log_stats=False,
        log_requests=False,
    )


def _adapters(config: EngineConfig) -> dict[str, Any]:
    if config.weight_transfer != "adapter":
        return {}
    assert config.adapter_rank is not None, "checked by the configuration"
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter.smallest_rank(config.adapter_rank)}
