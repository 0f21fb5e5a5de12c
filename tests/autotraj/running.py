"""What is asked of a run while it goes on: its actors' processes, and that its ledger loses nothing."""

import contextlib

import psutil

from autotraj.loop.grpo import GRPO


def runner_pids(actor: str = "RolloutActor") -> list[int]:
    """Of this test's own Ray, whose processes are our descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since it was listed; a zombie is one of those, too
            if " ".join(process.cmdline()).startswith(f"ray::{actor}"):
                found.append(process.pid)
    return found


def assert_nothing_lost(algo: GRPO) -> None:
    """Every (task, epoch) that was ever leased is in exactly one state."""
    counts = algo.ledger.counts()
    in_flight = counts.leased + counts.finished + counts.scored
    assert counts.scored == len(algo.buffer)
    assert counts.trained == algo.policy_version * algo.config.run_config.grpo.groups_per_step
    total = len(algo._tasks) * (algo.ledger.epoch + 1)
    assert counts.pending + in_flight + counts.trained + counts.dropped == total
