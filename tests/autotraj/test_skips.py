"""Skipped steps of every stage: counted, and too many in a row end it by name."""

import pytest

from autotraj.errors import NotFinite, RunError
from autotraj.skips import Skips
from learners.skipped_steps import combined, reasons, skipped, was_applied

GOOD = {"loss": 0.5, "ratio_max": 1.0}
BAD = skipped("nonfinite_loss")


def test_two_in_a_row_are_counted_and_the_third_ends_the_run() -> None:
    skips = Skips()
    assert [skips.took(m) for m in (BAD, BAD, GOOD, BAD, BAD)] == [False, False, True, False, False]
    assert skips.num_skipped == 4
    with pytest.raises(NotFinite, match=r"3 training steps in a row .* \(the last: nonfinite_gradient\)"):
        skips.took(skipped("nonfinite_gradient"))
    assert issubclass(NotFinite, RunError)


def test_a_training_shorter_than_that_does_not_end_as_done_without_a_step() -> None:
    with pytest.raises(NotFinite, match="1 training steps in a row"):
        Skips(num_steps=1).took(BAD)


def test_metrics_of_several_minibatches_are_those_of_the_applied_ones() -> None:
    found = combined([GOOD, BAD, {"loss": 1.5, "ratio_max": 3.0}, BAD])
    assert found == {"loss": 1.0, "ratio_max": 3.0, "skipped/nonfinite_loss": 2.0}
    assert was_applied(found)
    assert reasons(found) == ["nonfinite_loss"]
    assert not was_applied(combined([BAD, BAD]))
    assert not was_applied({})
