"""The logprob gate: after every weight sync, engine and learner must score a fixed text alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autotraj.errors import GateError
from trajectory.weights import LogprobProbe


def check(probe: LogprobProbe, logprobs: NDArray[np.float32], *, tolerance: float, who: str) -> float:
    """The largest |Δ logprob| on the probe, in nats. Raises GateError, which says where to look, if one is too large.

    A token may differ by `tolerance` nats, or by that share of its logprob where that is beyond −1 nat: rounding grows with
    the logits, and so with how unlikely a token of the prompt has become to a policy that trains on answers only."""
    ours, theirs = np.asarray(probe.logprobs, np.float64), np.asarray(logprobs, np.float64)
    deltas = np.abs(theirs - ours)
    allowed = tolerance * np.maximum(1.0, np.abs(ours))
    if not np.all(deltas <= allowed):  # NaN, too
        worst = int(np.argmax(deltas / allowed))  # a NaN is the largest
        raise GateError(
            f"weight sync gate: after the sync to policy version {probe.policy_version}, {who} and the learner differ by "
            f"{deltas[worst]:.3g} nats on a token of the probe whose logprob is {ours[worst]:.3g} (allowed: "
            f"{allowed[worst]:.3g}). Look for tied embeddings on CPU, a dtype mismatch (engine.dtype, learner.dtype), or a "
            "parameter that vLLM did not load (actors/weight_transfer.py)"
        )
    return float(np.max(deltas))
