"""The gate: after a weight sync an engine must hold what was published, and compute the learner's logprobs with it.

Exact: the checksums of what the engine holds equal those of what the learner published, tensor by tensor
(`models/checksums.py`).

Numeric: two kernels round differently, so logprobs differ without any fault, in bfloat16 by 0.01 to 0.1 nats a token and by
half a nat on some. So not one token counts but the mean of |Δ| and the k3 estimate of the KL divergence (Schulman,
"Approximating KL Divergence"), against what they were at the first sync, when the engine held exactly the weights from which
training starts. The largest |Δ| only warns. It catches what checksums can't: another position encoding, a wrong kernel, an
engine without checksums.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from actors.engine.protocol import GateAnswer
from autotraj.errors import GateError
from models.checksums import Checksums, HeldSums
from models.weight_update import LogprobProbe

logger = logging.getLogger(__name__)

NAMED = 5
"""How many tensors an error names."""
MIN_TOKENS = 64
"""Sampled tokens below which their mean says nothing."""
FACTOR = 5.0
"""A later mean |Δ| may be so many times that of the first sync; k3, which grows with the square, its square. Rounding grows
with the logits: of a random 0.5B in bfloat16 it was 14 times larger with weights three times as large, which training
doesn't do."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding alone may do in one dtype, in nats."""

    first: float  # largest mean |Δ| at the first sync, where nothing can be stale
    floor: float  # mean |Δ| that always passes
    floor_kl: float  # k3 that always passes: one token of a hundred, far off
    warns: float  # largest |Δ| of one token without a warning


ROUNDING = {
    # Of the tiny models 1e-6 to 1e-5 on average, on a probe of a hundred tokens; on sampled ones once 5e-4, and k3 2.5e-6
    "float32": Rounding(first=1e-4, floor=1e-3, floor_kl=1e-5, warns=1e-2),
    # Measured without a fault: means of 0.009 and 0.12 (random models), deviation 0.05 and largest 0.48 (vLLM and a trainer)
    "bfloat16": Rounding(first=0.2, floor=0.02, floor_kl=0.01, warns=1.0),
}
"""By the coarser of the engine's and the learner's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How the logprobs of an engine differ from the learner's, in nats a token."""

    num_tokens: float
    mean: float  # of |Δ|
    kl: float  # k3
    largest: float = 0.0  # |Δ|


def difference(learner: NDArray[np.floating], engine: NDArray[np.floating]) -> Difference:
    """Of the same tokens under both, (N,)."""
    ours, theirs = np.asarray(learner, np.float64), np.asarray(engine, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = ours - theirs
        return Difference(
            num_tokens=len(delta),
            mean=float(np.mean(np.abs(delta))),
            kl=float(np.mean(np.exp(delta) - 1 - delta)),
            largest=float(np.max(np.abs(delta))),
        )


def on_policy_difference(metrics: Mapping[str, float]) -> Difference:
    """Of a training step's tokens that were sampled with the learner's own weights, from its metrics
    (`learners/losses/policy.py`)."""
    tokens = metrics["on_policy_tokens"]
    return Difference(
        num_tokens=tokens,
        mean=metrics["on_policy_diff"] / max(tokens, 1.0),
        kl=metrics["on_policy_kl"] / max(tokens, 1.0),
    )


class Gate:
    """The gate of one run. `begin` with each publication, then `check` each engine that took it."""

    def __init__(self, coarser: Literal["float32", "bfloat16"]) -> None:
        self._coarser = coarser
        self._rounding = ROUNDING[coarser]
        self._first: dict[str, Difference] = {}  # what was compared → its difference at the first sync
        self._probe: LogprobProbe | None = None
        self._published = Checksums(policy_version=-1, dtype="float32", sums={})
        self._before = self._published
        self._told: set[str] = set()
        self.metrics: dict[str, float] = {}

    @property
    def probe(self) -> LogprobProbe:
        """The text that engines score."""
        assert self._probe is not None, "nothing was published yet"
        return self._probe

    @property
    def names(self) -> list[str]:
        """The tensors of which engines must tell the checksums."""
        return list(self._published.sums)

    def begin(self, probe: LogprobProbe, published: Checksums) -> None:
        """New weights were published. Raises GateError if they are none."""
        self._probe, self._before, self._published = probe, self._published, published
        if published.changed_share is not None:
            self.metrics["sync/changed_share"] = published.changed_share
        if not np.all(np.isfinite(probe.logprobs)):
            raise GateError(
                f"weight sync gate: the weights of policy version {probe.policy_version} give the probe logprobs that are "
                "not finite, in the learner itself: training has broken the policy. Lower learner.lr, then go on from the "
                "last checkpoint, if there is one"
            )

    def check(self, answer: GateAnswer, *, who: str) -> None:
        """Raises GateError, which says where to look, unless the engine holds what was published and computes with it."""
        self._check_held(answer.held, who)
        found = difference(self.probe.logprobs, answer.logprobs)
        self.metrics |= {
            "sync/logprob_diff_mean": found.mean,
            "sync/logprob_diff_max": found.largest,
            "sync/kl": found.kl,
            "sync/checksum_seconds": answer.sums_s,
        }
        at = f"after the sync to policy version {self.probe.policy_version}, {who} and the learner differ on the probe"
        self._judge("probe", found, at)

    def check_sampled(self, found: Difference) -> None:
        """The same for those tokens of a step's batch that engines sampled with the very weights that the learner had before
        its update. Raises GateError."""
        self.metrics["sync/sampled_tokens"] = found.num_tokens
        if found.num_tokens < MIN_TOKENS:
            return
        self.metrics |= {"sync/sampled_logprob_diff_mean": found.mean, "sync/sampled_kl": found.kl}
        self._judge(
            "sampled", found, "engines and the learner differ on the tokens that were sampled for the last step"
        )

    # --- exact -------------------------------------------------------------------------------------------------------

    def _check_held(self, held: HeldSums, who: str) -> None:
        sums = self._published.sums
        self.metrics["sync/tensors_unchecked"] = len(held.unknown)
        if held.unknown:
            self._tell_unknown(held.unknown, who)
        wrong = [name for name in sums if name not in held.unknown and held.sums.get(name) != sums[name]]
        if not wrong:
            return
        version, before = self._published.policy_version, self._before.sums
        stale = [name for name in wrong if held.sums.get(name) == before.get(name, sums[name])]
        if len(stale) == len(wrong):
            cause = f"they are still those of version {self._before.policy_version}, so the update did not reach them"
        elif len(wrong) == len(sums):
            cause = f"none is right: does it compute in {self._published.dtype}? If not, set engine.dtype"
        else:
            cause = "look for a parameter that the engine's loader leaves out or changes (actors/engine/)"
        named = "; ".join(f"{name}{self._as_what(held.sums.get(name))}" for name in wrong[:NAMED])
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise GateError(
            f"weight sync gate: after the sync to policy version {version}, {who} does not hold what was published. "
            f"{len(wrong)} of {len(sums)} tensors differ: {named}{more}. {cause[0].upper()}{cause[1:]}"
        )

    def _as_what(self, value: int | None) -> str:
        """What a tensor holds instead of its own values, if that is known."""
        if value is None:
            return " (not all of it arrived, or its ranks hold different copies)"
        for published in (self._published, self._before):
            for name, checksum in published.sums.items():
                if checksum == value:
                    return f" (it holds {name} of version {published.policy_version})"
        return ""

    def _tell_unknown(self, unknown: Mapping[str, str], who: str) -> None:
        """Says once for each reason that tensors are compared only by what comes of them."""
        for reason in sorted(set(unknown.values()) - self._told):
            names = [name for name, why in unknown.items() if why == reason]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            logger.warning(
                "weight sync gate: %s tells no checksum of %d of %d tensors, so that only logprobs show whether they "
                "arrive: %s%s (%s)",
                who, len(names), len(self._published.sums), ", ".join(names[:NAMED]), more, reason,
            )  # fmt: skip
            self._told.add(reason)

    # --- numeric -----------------------------------------------------------------------------------------------------

    def _judge(self, what: str, found: Difference, at: str) -> None:
        """Compares with the first of its kind, which `found` becomes if there is none."""
        rounding, first = self._rounding, self._first.get(what)
        if first is None:
            limit, limit_kl = rounding.first, max(rounding.first, rounding.floor_kl)
        else:
            limit = max(FACTOR * first.mean, rounding.floor)
            limit_kl = max(FACTOR**2 * first.kl, rounding.floor_kl)
        if not (found.mean <= limit and found.kl <= limit_kl):  # a NaN is not <=
            compared = f"{first.mean:.3g} at the first sync" if first else f"in {self._coarser} before any training"
            raise GateError(
                f"weight sync gate: {at}: |Δ logprob| is {found.mean:.3g} nats on average (allowed: {limit:.3g}, from "
                f"{compared}), k3 is {found.kl:.3g} (allowed: {limit_kl:.3g}), the largest {found.largest:.3g}. Every "
                "checksum that the engine told was right, so look for what differs in the computation (engine.dtype, "
                "learner.dtype, position encoding, kernels) or for a parameter without a checksum"
            )
        self._first.setdefault(what, found)
        if found.largest > rounding.warns:
            logger.warning("weight sync gate: %s by %.2g nats on one token", at, found.largest)
