"""Environment variables that a training process needs before torch, DeepSpeed or its allocator start."""

from __future__ import annotations

from learners.config import LearnerConfig

# glibc gives freed memory back to the kernel at every step and page-faults it in again: a third of the time of a CPU
# step was system time. Raised thresholds keep it.
_KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

# One bar or line per load, save and collective of every rank; errors still come through.
_QUIET = {
    "TQDM_DISABLE": "1",
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    "PYTHONWARNINGS": "ignore:`torch.distributed:FutureWarning",
}


def process_environment(config: LearnerConfig) -> dict[str, str]:
    """To be set when the process is started: afterwards is too late for the allocator."""
    on_gpu = config.num_gpus_per_learner > 0
    common = {"DS_ACCELERATOR": "cuda" if on_gpu else "cpu", "OMP_NUM_THREADS": str(config.num_cpus_per_learner)}
    return common | _QUIET | ({} if on_gpu else _KEEP_MEMORY)
