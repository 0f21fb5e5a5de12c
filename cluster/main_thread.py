"""Exceptions that a signal handler raises in the main thread.

They can be lost: Python drops what is raised in a destructor or in a hook of `fork`, and some library may swallow it. So
whoever raises repeats it until the exception is on its way.
"""

from __future__ import annotations

import signal
import sys
import threading


def is_unwinding(kind: type[BaseException]) -> bool:
    """In a signal handler: whether the main thread is in a `finally` or `except` that an exception of `kind` led to."""
    error = sys.exception()
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error is not None


def call_handler(number: int) -> None:
    """Has the main thread run its handler of signal `number`, from whatever it waits for."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)
