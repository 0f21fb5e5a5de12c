"""The first Ctrl-C asks, the second insists."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class Interrupt:
    """Set by the first Ctrl-C or SIGTERM: finish the step, write a checkpoint, stop. The second one raises."""

    requested: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step, with a checkpoint; again to stop at once", flush=True)


@contextmanager
def graceful_interrupt() -> Iterator[Interrupt]:
    """Turns SIGINT and SIGTERM into a request for the length of the block."""
    interrupt = Interrupt()
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
