"""Environment variables that must be set before torch, DeepSpeed or its allocator start in a training process."""

from __future__ import annotations

from learners.config import LearnerConfig

# glibc returns freed memory to the kernel at every step and gets it back by page faults: a third of the time of a CPU step
# was system time. Higher thresholds keep the memory.
_KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

# DeepSpeed 0.19 decorates an optimizer that isn't used here with `torch.compile`. To import that, torch's compiler is
# loaded, which takes a second or a fifth of a start. Nothing that trains on CPU is compiled.
_COMPILE_NOTHING = {"TORCHDYNAMO_DISABLE": "1"}

# Without these, every rank prints a bar or line for each load, save and collective. Errors are still printed.
_QUIET = {
    "TQDM_DISABLE": "1",
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    "PYTHONWARNINGS": "ignore:`torch.distributed:FutureWarning",
}


def process_environment(config: LearnerConfig) -> dict[str, str]:
    """Variables to set when the process is started, since afterwards it is too late for the allocator."""
    on_gpu = config.num_gpus_per_learner > 0
    common = {"DS_ACCELERATOR": "cuda" if on_gpu else "cpu", "OMP_NUM_THREADS": str(config.num_cpus_per_learner)}
    return common | _QUIET | ({} if on_gpu else _KEEP_MEMORY | _COMPILE_NOTHING)
