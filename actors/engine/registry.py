"""The inference engines that a configuration can name.

To add one, write a class with the methods of `protocol.Engine` and a function that makes it, and add a line to `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable

from actors.config import EngineConfig
from actors.engine.protocol import Engine


def vllm(config: EngineConfig, seed: int) -> Engine:
    from actors.engine.vllm import VLLMEngine  # it imports torch, which takes seconds

    return VLLMEngine(config, seed=seed)


ENGINES: dict[str, Callable[[EngineConfig, int], Engine]] = {"vllm": vllm}
"""`EngineConfig.kind` → a function that makes an engine from a configuration and a seed. Its `start` loads the model."""


def check_kind(config: EngineConfig, key: str = "engine") -> None:
    """Raises ValueError, which names the setting, if there is no such engine. `key` is the section's."""
    if config.kind not in ENGINES:
        raise ValueError(f"{key}.kind = {config.kind!r} is no known engine; these are: {', '.join(ENGINES)}")


def make_engine(config: EngineConfig, *, seed: int) -> Engine:
    """The engine that `config` names. Raises ValueError as `check_kind` does."""
    check_kind(config)
    return ENGINES[config.kind](config, seed)
