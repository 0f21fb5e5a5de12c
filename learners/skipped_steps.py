"""Optimizer steps that were skipped because their loss or their gradient was not finite. Pure functions.

Such a step changes nothing: not the weights, not the optimizer's moments, not the learning rate's schedule, not the policy
version. A metric names the reason, `skipped/nonfinite_loss` or `skipped/nonfinite_gradient`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Reason = Literal["nonfinite_loss", "nonfinite_gradient"]

PREFIX = "skipped/"
SAMPLES = "samples_skipped"
"""Metric of a batch that was skipped in part: the number of samples with a gradient that were not trained on."""


def skipped(reason: Reason) -> dict[str, float]:
    """The metrics of an optimizer step that was skipped."""
    return {f"{PREFIX}{reason}": 1.0}


def reasons(metrics: Mapping[str, float]) -> list[str]:
    """Why optimizer steps of this batch were skipped. Empty if none was."""
    return [name.removeprefix(PREFIX) for name in metrics if name.startswith(PREFIX)]


def was_applied(metrics: Mapping[str, float]) -> bool:
    """Whether at least one optimizer step of this batch changed the weights."""
    return any(not name.startswith(PREFIX) for name in metrics)


def combined(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a batch's optimizer steps as one: the largest value of those that end in `_max`, the number of skipped
    steps, and the mean of all others over the steps that were applied."""
    applied = [step for step in steps if was_applied(step)]
    found = {
        name: max(step[name] for step in applied)
        if name.endswith("_max")
        else sum(step[name] for step in applied) / len(applied)
        for name in (applied[0] if applied else ())
    }
    for step in steps:
        for reason in reasons(step):
            found[f"{PREFIX}{reason}"] = found.get(f"{PREFIX}{reason}", 0.0) + step[f"{PREFIX}{reason}"]
    return found
