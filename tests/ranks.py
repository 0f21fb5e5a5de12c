"""Runs a function on several ranks over gloo, each in a process of its own, without Ray."""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

COLLECTIVE_S = 150
"""After this time a collective that not all ranks take part in ends with an error."""
DEADLINE_S = 280


def on_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)`, a function of a module, returns on each rank. All ranks are members of one process group.

    `folder` is empty, or holds what other calls left. Raises AssertionError with the traceback of the first rank that
    failed."""
    place = Path(folder) / f"{time.monotonic_ns()}"
    place.mkdir(parents=True)
    processes = mp.start_processes(
        _rank, (world_size, place, function, args), nprocs=world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not processes.join(timeout=1, grace_period=5):
            assert time.monotonic() < deadline, f"the ranks didn't end within {DEADLINE_S} s"
    except mp.ProcessExitedException as died:
        raise AssertionError(f"a rank died: {died}") from died
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
    for rank in range(world_size):
        failure = place / f"{rank}.txt"
        assert not failure.exists(), f"rank {rank}: {failure.read_text()}"
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, place: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "TQDM_DISABLE": "1"}
    torch.set_num_threads(1)
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    try:
        result = function(*args)
    except Exception:
        (place / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(0)  # not by way of the group's end, which may wait for ranks that will never come
    torch.save(result, place / f"{rank}.pt")
    dist.destroy_process_group()
