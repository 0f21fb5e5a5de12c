"""Signals of the main thread, and the exceptions that their handlers raise in it.

Such an exception can be lost: Python drops what is raised in a destructor or in a hook of `fork`, and a library may swallow
it. So the caller must repeat it until the exception is being handled.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def is_unwinding(kind: type[BaseException]) -> bool:
    """Whether the main thread is in a `finally` or `except` that an exception of `kind` led to. For signal handlers."""
    error = sys.exception()
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error is not None


def call_handler(number: int) -> None:
    """Make the main thread run its handler of signal `number`, whatever it waits for."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)


@contextmanager
def signals_kept() -> Iterator[None]:
    """A block in which SIGINT and SIGTERM take effect only at its end, also if it raises. What is only partly started can't
    be stopped, and an exception that is raised in the middle of the block may be lost.

    Handlers that the block sets don't stay: Ray's core replaces our handler of SIGTERM by its own, with which a stopped job
    would end at once instead of writing its checkpoint (2.60). Outside the main thread, which alone can set handlers, this
    does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: seen.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if seen:
            signal.raise_signal(seen[0])
