"""The stages of a run: for each one a record, from which the configuration, the command line, the pipeline and the checks of
a folder that is continued take what they need. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotraj.errors import UserError
from trajectory.records import check_preference, check_sft, read_jsonl

SFT_FILE, PREFERENCES_FILE = "sft.jsonl", "preferences.jsonl"
RUN = ("model ", "seed ", "stages ", "data.")
SAMPLING = ("engine.kind ", "engine.dtype ", "engine.max_model_len ", "episode.", "reward.", "sandbox.search.")
LEARNER = (
    "learner.dtype ",
    "learner.betas ",
    "learner.eps ",
    "learner.weight_decay ",
    "learner.max_grad_norm ",
    "learner.seed ",
)

BASE_SHAPED_BY = (*RUN, *SAMPLING, "eval.")
"""As `Stage.shaped_by`, for the measurement of the base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """A file of records that an earlier stage writes."""

    made_by: str
    """Name of that stage, without which this one can't run, unless its section's `data` names a file of the user's own."""
    file: str
    """The file's name in that stage's folder."""
    fields: tuple[str, ...]
    """Fields that each record must have."""
    check: Callable[[Mapping[str, Any]], None]
    """Raises ValueError, with the reason, for a record that isn't of this kind."""

    def check_file(self, path: Path) -> None:
        """Raises UserError, with the line, unless the file holds such records and at least one."""
        try:
            records = read_jsonl(path, self.fields, self.check)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        if not records:
            raise UserError(f"{path} is empty: there is nothing to learn from")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of `run`."""

    name: str
    """As it is called in `stages`, on the command line and in `stages.json`."""
    folder: str
    """Its folder in the run's. The report shows the `metrics.jsonl` in it."""
    run: str
    """`module:function` of what it does. The function takes the `Pipeline`, and returns the stage's figures for
    `stages.json` and `summary.json`. With `samples` it also takes the engines, a `RunnerPool`."""
    shaped_by: tuple[str, ...]
    """The beginnings of the settings that decide what it makes, as `config.differences` writes them. They can't change once
    the stage has begun."""
    help: str = ""
    """What its command does. Empty: the stage has no command, or one that the command line defines by itself."""
    samples: bool = False
    """Whether it samples from the base model. Such stages come first: the base model is measured with the same engines."""
    input: StageInput | None = None
    """The file that it learns from."""
    learner_section: str = ""
    """The section whose `lora` its learners use. Empty: it has no learners, and so writes no checkpoints."""
    starts_from: str = ""
    """The stage whose policy it starts from, if the run has that stage; otherwise it starts from `model`."""


SYNTHESIZE = Stage(
    name="synthesize",
    folder="synthesis",
    run="autotraj.stages.synthesize:run",
    help="stage 1: sample, score, keep good trajectories, repair bad ones",
    samples=True,
    shaped_by=(
        *RUN,
        *SAMPLING,
        "synthesis.",
        "quality.",
        "repair.repairer ",
        "repair.engine ",
        "repair.engine.model ",
        "repair.engine.kind ",
        "repair.engine.dtype ",
        "repair.endpoint ",
        "repair.endpoint.model ",
        "repair.temperatures ",
        "repair.right_prompt ",
        "repair.wrong_prompt ",
        "repair.problems_as ",
        "repair.require_tools ",
        "repair.max_trajectory_chars ",
        "repair.max_prompt_tokens ",
    ),
)
SFT = Stage(
    name="sft",
    folder="sft",
    run="autotraj.stages.sft:run",
    help="fine-tune on what synthesize made",
    input=StageInput(made_by="synthesize", file=SFT_FILE, fields=("messages",), check=check_sft),
    learner_section="sft",
    shaped_by=(*RUN, *LEARNER, "sft."),
)
REWARD_MODEL = Stage(
    name="reward-model",
    folder="reward_model",
    run="autotraj.stages.reward_model:run",
    help="train the trajectory reward model on the preference pairs",
    input=StageInput(
        made_by="synthesize",
        file=PREFERENCES_FILE,
        fields=("chosen", "rejected"),
        check=check_preference,
    ),
    learner_section="reward_model",
    starts_from="sft",
    shaped_by=(*RUN, *LEARNER, "reward_model.", "scorer.mask_results "),
)
GRPO = Stage(
    name="grpo",
    folder="grpo",
    run="autotraj.stages.grpo:run",
    learner_section="learner",
    starts_from="sft",
    # A checkpoint of GRPO holds what depends on these: its weights, optimizer, ledger, saved groups and folder.
    shaped_by=(
        "model ",
        "run_dir ",
        "seed ",
        "data.",
        "episode.temperature ",
        "rollout.group_size ",
        "grpo.groups_per_step ",
        "learner.lora",
        "learner.dtype ",
        "learner.head ",
        "reward_model.path ",
        "scorer.mask_results ",
    ),
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in (SYNTHESIZE, SFT, REWARD_MODEL, GRPO)}
"""Name → stage, in the order in which they run."""
