"""Opens the folder of a `run` before its first stage: checks whether the run fits, and what is done already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotraj.config.run import RunConfig, load_saved, to_toml, with_changes
from autotraj.config.stage_registry import REWARD_MODEL, STAGES, SYNTHESIZE
from autotraj.errors import UserError
from autotraj.run_folder.changes import check_learners, refused
from autotraj.run_folder.folder import newest
from autotraj.run_folder.location import RunLocation
from autotraj.training import supervised
from learners.config import LearnerConfig


def open_folder(config: RunConfig, *, only: str | None = None) -> bool:
    """Makes a new run folder, or opens one to continue; returns whether all of it is done already. A run that is done is
    continued if `config` asks for more steps of GRPO.

    `only`: the one stage that is to run. Raises UserError, before it changes anything, if that is done, and if the folder
    holds a run that these settings don't fit."""
    location = RunLocation.of(config)
    location.check()
    location.pull()
    location.path.mkdir(parents=True, exist_ok=True)
    saved = _fitting(location, config)
    done = supervised.read_done(location.path)
    if only in done:
        raise UserError(
            f"{only} is done in {config.run_dir} ({supervised.STAGES_FILE}); to do it again choose another run_dir"
        )
    if saved is None:
        if newest(location):
            raise UserError(f"run_dir: {location} holds a run of the command `grpo`; choose another run_dir")
    elif only is None and _is_complete(location.path, done, saved, config):
        return True
    if "grpo" in done and not _has_its_steps(done, saved or config, config):
        # Before the configuration is written: with the new one, the run would look complete.
        supervised.write_done(
            location.path, {name: done[name] for name in done if name not in ("grpo", "evaluate-grpo")}
        )
    (location.path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return False


def is_complete(config: RunConfig) -> bool:
    """Whether a local run folder has all that `config` asks for. False for a URI, where only `open_folder` can know it.

    Writes nothing. Raises UserError as `open_folder` does."""
    location = RunLocation.of(config)
    saved = None if location.storage else _fitting(location, config)
    return saved is not None and _is_complete(location.path, supervised.read_done(location.path), saved, config)


def _is_complete(path: Path, done: Mapping[str, Any], saved: RunConfig, config: RunConfig) -> bool:
    last = "grpo" if "grpo" in config.stages else "evaluate-sft" if "sft" in config.stages else "base"
    wanted = {"base", *config.stages, last}
    return wanted <= done.keys() and (path / "summary.json").is_file() and _has_its_steps(done, saved, config)


def _has_its_steps(done: Mapping[str, Any], saved: RunConfig, config: RunConfig) -> bool:
    """Whether GRPO isn't done at all, or was done with at least as many steps as are asked for now. It may have ended early,
    with nothing left to learn from."""
    if "grpo" not in done:
        return True
    steps: int = done["grpo"].get("num_steps", saved.grpo.num_steps)
    return steps >= config.grpo.num_steps


def _fitting(location: RunLocation, config: RunConfig) -> RunConfig | None:
    """The last settings of a run's folder, or None for a new one. Raises UserError if `config` can't continue what is in the
    folder."""
    saved_file = location.path / "config.toml"
    if not saved_file.is_file():
        return None
    saved = with_changes(load_saved(saved_file), {"run_dir": config.run_dir})  # the folder may have been moved
    done = supervised.read_done(location.path)
    checkpoints = {
        name: newest(RunLocation.of(config, STAGES[name].folder)) for name in STAGES if STAGES[name].learner_section
    }
    if "synthesize" not in done:
        from autotraj.stages.journal import read_journal

        read_journal(location.path / SYNTHESIZE.folder)  # for its errors
    there: dict[str, bool] = {
        "base": bool(done.keys() & {"base", "evaluate-base", "evaluate-sft"}),
        **{
            name: name in done
            or (checkpoints[name] is not None if name in checkpoints else (location.path / stage.folder).is_dir())
            for name, stage in STAGES.items()
        },
    }
    begun = [name for name in there if there[name]]
    if changes := refused(saved, config, begun):
        raise UserError(
            f"run_dir: {location} holds a run with other settings ({'; '.join(changes[:4])}), which were "
            f"used for its {', '.join(begun)}; give the same settings to go on with it, or choose another run_dir"
        )
    for name, checkpoint in checkpoints.items():
        if checkpoint and (name == "grpo" or name not in done):
            check_learners(checkpoint.learners, _learners_of(name, config))
    return saved


def _learners_of(name: str, config: RunConfig) -> LearnerConfig:
    """The learner's settings of a stage. They decide whether its learners can load its checkpoint."""
    lora = getattr(config, STAGES[name].learner_section).lora
    return config.learner.model_copy(update={"lora": lora})


def at_its_largest(config: RunConfig) -> RunConfig:
    """The settings by which Ray's resources are chosen: GRPO with the reward model that an earlier stage will make."""
    if "reward-model" not in config.stages or "grpo" not in config.stages:
        return config
    return with_changes(config, {"reward_model.path": RunLocation.of(config).model(REWARD_MODEL.folder, "model")})
