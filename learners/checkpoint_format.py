"""The description in a learner checkpoint, and which learners can load it. It is read before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learners.config import LearnerConfig

META_FILE = "learner.json"
"""This file is written last: a checkpoint with it is complete."""

CONVERTIBLE = {1, 2}
"""ZeRO stages between which DeepSpeed's universal checkpoint converts (0.19). Stage 3 fails both ways; 0 isn't sharded."""


def kind(config: LearnerConfig) -> dict[str, Any]:
    """The settings that decide, besides the model, which tensors a checkpoint contains."""
    return {
        "zero_stage": config.zero_stage,
        "adapters_only": config.lora is not None,
        "bfloat16": config.in_bfloat16,
        "decays_weights": config.weight_decay > 0,
    }


def check(meta: Mapping[str, Any], config: LearnerConfig, where: str) -> None:
    """Raises ValueError if learners of `config` can't load the checkpoint at `where`, whose `META_FILE` is `meta`. The
    message begins with the setting.

    A checkpoint of an earlier version has fewer entries; a missing entry counts as fitting."""
    ours = kind(config)
    theirs = ours | {name: value for name, value in meta.items() if name in ours}
    if theirs["adapters_only"] != ours["adapters_only"]:
        held, trained = ("adapters", "all weights") if theirs["adapters_only"] else ("all weights", "adapters")
        raise ValueError(
            f"lora: {where} holds {held} and this learner trains {trained}: its lora setting is another one"
        )
    if (then := theirs["zero_stage"]) != config.zero_stage and {then, config.zero_stage} != CONVERTIBLE:
        raise ValueError(
            f"zero_stage: {where} was written with zero_stage={then}, which zero_stage={config.zero_stage} can't load (only "
            f"1 and 2 can be converted into each other): set zero_stage={then}"
        )
    if theirs["bfloat16"] != ours["bfloat16"]:
        names = {True: "bfloat16", False: "float32"}
        raise ValueError(
            f"dtype: {where} was written by learners in {names[theirs['bfloat16']]}, and these train in "
            f"{names[ours['bfloat16']]}: set dtype='{names[theirs['bfloat16']]}'"
        )
    if theirs["decays_weights"] != ours["decays_weights"]:
        which = "with" if theirs["decays_weights"] else "without"
        raise ValueError(
            f"weight_decay: {where} was written by an optimizer {which} weight decay, whose state is laid out in another "
            f"way: weight_decay={config.weight_decay:g} must {'be above' if theirs['decays_weights'] else 'stay'} 0"
        )
