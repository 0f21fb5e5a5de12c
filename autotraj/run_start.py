"""Before the first stage of a `run`: its folder, and what Ray must have room for."""

from __future__ import annotations

from pathlib import Path

from autotraj import stages
from autotraj.config import RunConfig, differences, load, to_toml, with_changes
from autotraj.errors import UserError
from autotraj.home import Home
from autotraj.run_folder import newest


def open_folder(config: RunConfig) -> Path:
    """The run folder, new or to go on with. Raises UserError if it holds a run of other settings."""
    home = Home.of(config)
    path = home.path
    home.check()
    home.pull()
    path.mkdir(parents=True, exist_ok=True)
    saved = path / "config.toml"
    if saved.is_file() and (differing := differences(load(saved), config)):
        raise UserError(
            f"run_dir: {home} holds a run with other settings ({'; '.join(differing[:4])}); choose another run_dir, or "
            "give the same settings to go on with it"
        )
    if not saved.is_file() and newest(home):
        raise UserError(f"run_dir: {home} holds a run of the command `grpo`; choose another run_dir")
    saved.write_text(to_toml(config), encoding="utf-8")
    return path


def at_its_largest(config: RunConfig) -> RunConfig:
    """What Ray must have room for: GRPO with the reward model that an earlier stage will have made."""
    if "reward-model" not in config.stages or "grpo" not in config.stages:
        return config
    return with_changes(config, {"reward_model.path": Home.of(config).model(stages.REWARD_MODEL, "model")})
