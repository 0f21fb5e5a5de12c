"""Explains in one sentence what an error means in this sandbox, if the error itself doesn't say it.

`NO_NETWORK` is also part of the errors themselves, as code often catches and prints them.
"""

from __future__ import annotations

import errno
import importlib
import socket
import sys
from collections.abc import Callable
from typing import Any

NO_NETWORK = "there is no network in this sandbox, not even to 127.0.0.1"
NO_INPUT = "nobody answers input() in this sandbox: put the values into the code"


def name_no_network() -> None:
    """Makes look-ups of names fail with `NO_NETWORK`. The usual "temporary" reason would make code try again."""
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
        setattr(socket, name, _with_advice(getattr(socket, name)))


def _with_advice(look_up: Callable[..., Any]) -> Callable[..., Any]:
    def advised(*arguments: Any, **options: Any) -> Any:
        try:
            return look_up(*arguments, **options)
        except OSError as error:
            raise type(error)(error.errno, NO_NETWORK) from None

    return advised


def is_of_network(error: BaseException) -> bool:
    """Whether `error`, or one that caused it, says that there is no network."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and (error.errno == errno.ENETUNREACH or error.strerror == NO_NETWORK):
            return True
        error = error.__cause__ or error.__context__ or error
    return False


def advice(error: BaseException) -> str:
    """A sentence without a full stop; empty if the error needs no explanation."""
    if is_of_network(error):
        return NO_NETWORK
    if isinstance(error, EOFError) and error.args == ("EOF when reading a line",):
        return NO_INPUT
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.partition(".")[0]
        if top in sys.stdlib_module_names:
            return f"this sandbox's Python comes without {top}"
        if top not in sys.modules:
            return str(importlib.import_module("pip").without(top))
    return ""
