"""The logprob gate: after every weight sync, engine and learner must give a fixed text the same logprobs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autotraj.errors import GateError
from models.weight_update import LogprobProbe

ROUNDING = 1e-5
"""The relative rounding error of a logprob in float32: some 170 units in the last place. It exceeds 1e-4 only for tokens
below −10 nats; bfloat16's tolerance is far above it."""


def check(probe: LogprobProbe, logprobs: NDArray[np.float32], *, tolerance: float, who: str) -> float:
    """The largest |Δ logprob| on the probe, in nats. Raises GateError, which says where to look, if one is too large.

    A token may differ by `tolerance` nats, or by `ROUNDING` of its logprob if that is more."""
    ours, theirs = np.asarray(probe.logprobs, np.float64), np.asarray(logprobs, np.float64)
    deltas = np.abs(theirs - ours)
    allowed = np.maximum(tolerance, ROUNDING * np.abs(ours))
    if not np.all(np.isfinite(ours)):
        raise GateError(
            f"weight sync gate: the weights of policy version {probe.policy_version} give the probe logprobs that are not "
            "finite, in the learner itself: training has broken the policy. Lower learner.lr, then go on from the last "
            "checkpoint, if there is one"
        )
    if not np.all(deltas <= allowed):  # a NaN is not <=
        with np.errstate(invalid="ignore"):
            worst = int(np.argmax(deltas / allowed))  # a NaN is the largest
        raise GateError(
            f"weight sync gate: after the sync to policy version {probe.policy_version}, {who} and the learner differ by "
            f"{deltas[worst]:.3g} nats on a token of the probe whose logprob is {ours[worst]:.3g} (allowed: "
            f"{allowed[worst]:.3g}). Look for tied embeddings on CPU, a dtype mismatch (engine.dtype, learner.dtype), or a "
            "parameter that vLLM did not load (actors/engine/weight_transfer.py)"
        )
    return float(np.max(deltas))
