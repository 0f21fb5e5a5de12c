"""Whether a process was ended for memory: by Ray's memory monitor, which says so, or by the kernel, which only counts."""

from __future__ import annotations

from pathlib import Path

from learners.errors import LearnerOutOfMemory

VMSTAT = Path("/proc/vmstat")


class MemoryDeaths:
    """Counts those of one kind of actor. Of the kernel's only those on this machine are seen."""

    def __init__(self) -> None:
        self.count = 0
        self._kernel_kills = kernel_kills()

    def note(self, error: Exception) -> bool:
        """Whether the actor that `error` is of was ended for memory; counts it then."""
        import ray  # here: the command line imports this module before it knows that anything runs

        kills = kernel_kills()
        by_kernel, self._kernel_kills = kills > self._kernel_kills, kills
        found = by_kernel or isinstance(error, ray.exceptions.OutOfMemoryError | LearnerOutOfMemory)
        self.count += found
        return found


def kernel_kills() -> int:
    """Processes that this machine's kernel has killed for memory since it started; 0 where it doesn't tell."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
