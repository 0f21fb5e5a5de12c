"""The logprob gate, by hand."""

import numpy as np
import pytest

from autotraj.errors import GateError
from autotraj.runners import gate
from models.weight_update import LogprobProbe


def probe(*logprobs: float) -> LogprobProbe:
    return LogprobProbe(
        policy_version=7, token_ids=(1,) * (len(logprobs) + 1), logprobs=np.array(logprobs, dtype=np.float32)
    )


def check(ours: LogprobProbe, *theirs: float, tolerance: float = 1e-4) -> float:
    return gate.check(ours, np.array(theirs, dtype=np.float32), tolerance=tolerance, who="rollout actor 2")


def test_the_largest_difference_in_nats_is_told() -> None:
    assert check(probe(-0.5, -2.0), -0.50004, -2.00006) == pytest.approx(6e-5, abs=1e-6)


def test_a_token_may_differ_by_the_tolerance_and_a_very_unlikely_one_by_its_rounding() -> None:
    assert check(probe(-0.5, -20.0), -0.50009, -20.00019) == pytest.approx(1.9e-4, abs=3e-6)
    with pytest.raises(GateError, match=r"rollout actor 2 and the learner differ by 0\.00011 nats .* logprob is -0\.5"):
        check(probe(-0.5, -20.0), -0.50011, -20.0)
    with pytest.raises(GateError, match=r"version 7, .* differ by 0\.00021 nats .* is -20 \(allowed: 0\.0002\)"):
        check(probe(-0.5, -20.0), -0.5, -20.00021)


def test_the_tolerance_of_bfloat16_does_not_grow() -> None:
    with pytest.raises(GateError, match=r"\(allowed: 0\.3\)"):
        check(probe(-40.0), -40.31, tolerance=0.3)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((-0.5, -2.0), (float("nan"), -2.0)),
        ((-0.5, -2.0), (-0.5, float("-inf"))),
        ((-0.5, float("-inf")), (-0.5, -2.0)),
    ],
)
def test_what_is_no_number_never_passes(ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    with pytest.raises(GateError, match="weight sync gate"):
        check(probe(*ours), *theirs)
