"""The logprob gate: after every weight sync, engine and learner must score a fixed text alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autotraj.errors import GateError
from trajectory.weights import LogprobProbe


def check(probe: LogprobProbe, logprobs: NDArray[np.float32], *, tolerance: float, who: str) -> float:
    """The largest |Δ logprob| on the probe, in nats. Raises GateError, which says where to look, if it is too large."""
    delta = float(np.max(np.abs(np.asarray(logprobs, np.float64) - probe.logprobs)))
    if not delta <= tolerance:  # NaN, too
        raise GateError(
            f"weight sync gate: after the sync to policy version {probe.policy_version}, {who} and the learner differ by "
            f"{delta:.3g} nats on the probe (allowed: {tolerance:.3g}). Look for tied embeddings on CPU, a dtype mismatch "
            "(engine.dtype, learner.dtype), or a parameter that vLLM did not load (actors/weight_transfer.py)"
        )
    return delta
