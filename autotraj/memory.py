"""Finds out whether a process was ended because of memory: by Ray's memory monitor, which reports it, or by the kernel."""

from __future__ import annotations

from pathlib import Path

from learners.errors import LearnerOutOfMemory

VMSTAT = Path("/proc/vmstat")


class MemoryDeaths:
    """Counts the actors of one kind that were ended because of memory. Kills by the kernel are only seen on this machine."""

    def __init__(self) -> None:
        self.count = 0
        self._kernel_kills = kernel_kills()

    def note(self, error: Exception) -> bool:
        """Counts the actor that raised `error` if it was ended because of memory, and returns whether it was."""
        import ray  # here, as the command line imports this module before it needs Ray

        kills = kernel_kills()
        by_kernel, self._kernel_kills = kills > self._kernel_kills, kills
        found = by_kernel or isinstance(error, ray.exceptions.OutOfMemoryError | LearnerOutOfMemory)
        self.count += found
        return found


def kernel_kills() -> int:
    """How many processes this machine's kernel has killed because of memory since it started; 0 if it doesn't report it."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
