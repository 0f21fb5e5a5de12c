"""Passes weights to an engine on the same node, as a safetensors file in shared memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

SHARED_MEMORY = Path("/dev/shm")


def write(payload: Mapping[str, tuple[NDArray[np.generic], str]]) -> Path:
    """A new file with `payload`'s tensors (name → (array, dtype name); bfloat16 as its uint16 bits). The caller unlinks it.

    It is in shared memory if that has room (a container's default is 64 MiB), otherwise in the folder for temporary files.
    """
    num_bytes = sum(array.nbytes for array, _ in payload.values())
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 1.1 * num_bytes
    handle, name = tempfile.mkstemp(prefix="autotraj-", suffix=".safetensors", dir=SHARED_MEMORY if roomy else None)
    os.close(handle)
    try:
        save_file({key: _tensor(array, dtype) for key, (array, dtype) in payload.items()}, name)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def read(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the file's (name, tensor), one after another."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            yield name, file.get_tensor(name)


def _tensor(array: NDArray[np.generic], dtype: str) -> torch.Tensor:
    with warnings.catch_warnings():
        # Arrays from Ray's object store are read-only, and they are only read here.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
