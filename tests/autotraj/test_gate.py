"""The logprob gate, by hand."""

import numpy as np
import pytest

from autotraj import gate
from autotraj.errors import GateError
from trajectory.weights import LogprobProbe


def probe(*logprobs: float) -> LogprobProbe:
    return LogprobProbe(
        policy_version=7, token_ids=(1,) * (len(logprobs) + 1), logprobs=np.array(logprobs, dtype=np.float32)
    )


def check(ours: LogprobProbe, *theirs: float) -> float:
    return gate.check(ours, np.array(theirs, dtype=np.float32), tolerance=1e-3, who="rollout actor 2")


def test_the_largest_difference_in_nats_is_told() -> None:
    assert check(probe(-0.5, -2.0), -0.5004, -2.0006) == pytest.approx(6e-4, abs=1e-6)


def test_a_likely_token_may_differ_by_the_tolerance_an_unlikely_one_by_that_share_of_its_logprob() -> None:
    assert check(probe(-0.5, -20.0), -0.5009, -20.019) == pytest.approx(0.019, abs=1e-5)
    with pytest.raises(GateError, match=r"rollout actor 2 and the learner differ by 0\.0011 nats .* logprob is -0\.5"):
        check(probe(-0.5, -20.0), -0.5011, -20.0)
    with pytest.raises(GateError, match=r"version 7, .* differ by 0\.021 nats .* logprob is -20 \(allowed: 0\.02\)"):
        check(probe(-0.5, -20.0), -0.5, -20.021)


@pytest.mark.parametrize("theirs", [(float("nan"), -2.0), (-0.5, float("-inf"))])
def test_what_is_no_number_never_passes(theirs: tuple[float, float]) -> None:
    with pytest.raises(GateError, match="weight sync gate"):
        check(probe(-0.5, -2.0), *theirs)
