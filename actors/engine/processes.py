"""Ends an engine's processes when the actor that started them is gone, even after a kill -9.

vLLM's core notices that its client is dead only when it next sends to it, and the workers of a tensor-parallel engine end
with the core (0.32). A raylet ends what a dead actor has started, but not if it died itself. Then they would keep their
memory and their GPUs. With one device the core is the worker. With more, the core has none of our code but the executor,
whose class it is given.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


def end_with_parent() -> None:
    """End this process, from now on, as soon as the process that started it is gone. Does nothing outside of a child."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


class TensorParallelExecutor(MultiprocExecutor):
    """vLLM's executor of one process a GPU. The core process makes it before the workers, and ends with the actor."""

    def _init_executor(self) -> None:
        end_with_parent()
        super()._init_executor()
