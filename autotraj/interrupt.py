"""Ctrl-C and SIGTERM. They end a command at once if nothing is lost by it; a stage that trains ends after its step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

from cluster.exit_codes import EXIT_INTERRUPTED
from cluster.main_thread import call_handler, is_unwinding, signals_kept

NUMBERS = (signal.SIGINT, signal.SIGTERM)
REMIND_EVERY_S = 0.5


@dataclass(slots=True)
class Interrupt:
    """The signal handler of `graceful_interrupt`. If `requested` is set, a stage finishes its step and stops.

    `nothing_begun`: everything that this process would have to end is within `taken_down_in_order`, and nothing has begun
    yet. Then a signal during an import, which may take half a minute and can't be broken off, ends the process with
    `way_on`."""

    requested: bool = False
    nothing_begun: bool = False
    way_on: str = ""
    _deferred: bool = False
    _ending: bool = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which the first signal only sets `requested`, which the block checks. The second signal raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._ending:
            if not _is_importing(frame) and not is_unwinding(
                KeyboardInterrupt
            ):  # the exception was lost, so raise again
                raise KeyboardInterrupt
            return
        if self._deferred and not self.requested:
            self.requested = True
            print("\nstopping, with a checkpoint, when no step is being trained; again to stop at once", flush=True)
            return
        self.requested = self._ending = True
        importing = _is_importing(frame)
        if importing and self.nothing_begun:
            print(f"\n{last_words(self.way_on)}", flush=True)
            os._exit(EXIT_INTERRUPTED)
        print("\nstopping; what was started is ended in order", flush=True)
        if not importing:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if the command was asked to end. To be called after code that can't be broken off."""
        if self._ending:
            raise KeyboardInterrupt

    def remind(self, closed: threading.Event) -> None:
        """Runs in a thread until `closed`. Calls the handler in the main thread again if the command was asked to end."""
        while not closed.wait(REMIND_EVERY_S):
            if self._ending:
                call_handler(signal.SIGINT)


def last_words(way_on: str) -> str:
    """The message of an interrupted command. `way_on` says how to continue, without a capital letter or a full stop."""
    return "interrupted" + (f". {way_on[0].upper()}{way_on[1:]}" if way_on else "")


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported. If something is raised then, torch's C++ ends the process with SIGABRT."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def graceful_interrupt() -> Iterator[Interrupt]:
    """Let an `Interrupt` handle SIGINT and SIGTERM during the block. For the main thread only.

    A block within another one shares its `Interrupt`. A request that comes during an import is only noted; the inner block
    then raises KeyboardInterrupt before it begins anything."""
    outer = signal.getsignal(signal.SIGINT)
    if isinstance(outer, Interrupt):
        outer.check()
        yield outer
        return
    interrupt, closed = Interrupt(), threading.Event()
    previous = {number: signal.signal(number, interrupt) for number in NUMBERS}
    reminder = threading.Thread(target=interrupt.remind, args=(closed,), name="interrupt-reminder", daemon=True)
    reminder.start()
    try:
        yield interrupt
    finally:
        closed.set()
        reminder.join()
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def taken_down_in_order() -> Iterator[ExitStack]:
    """A stack whose parts are all closed at the end of the block. Signals that come meanwhile take effect afterwards."""
    if isinstance(handler := signal.getsignal(signal.SIGINT), Interrupt):
        handler.nothing_begun = False
    with ExitStack() as outer, ExitStack() as parts:
        try:
            yield parts
        finally:
            outer.enter_context(signals_kept())
