"""The sandbox as a run sees it: a gateway that is there, or one of the run's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from autotraj.config import load
from tool_sandbox.config import SandboxConfig


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where tool calls go."""

    address: str
    token: str | None
