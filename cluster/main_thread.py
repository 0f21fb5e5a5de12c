"""Exceptions that a signal handler raises in the main thread.

Such an exception can be lost: Python drops what is raised in a destructor or in a hook of `fork`, and a library may swallow
it. So the caller must repeat it until the exception is being handled.
"""

from __future__ import annotations

import signal
import sys
import threading


def is_unwinding(kind: type[BaseException]) -> bool:
    """Whether the main thread is in a `finally` or `except` that an exception of `kind` led to. For signal handlers."""
    error = sys.exception()
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error is not None


def call_handler(number: int) -> None:
    """Make the main thread run its handler of signal `number`, whatever it waits for."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)
