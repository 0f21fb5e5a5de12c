"""Skipped steps of every stage: counted, and too many in a row end it by name."""

import pytest

from autotraj.errors import NotFinite, RunError
from autotraj.training.skips import Skips
from learners.skipped_steps import SAMPLES, combined, reasons, skipped, was_applied

GOOD = {"loss": 0.5, "ratio_max": 1.0}
BAD = skipped("nonfinite_loss")
IN_PART = combined([GOOD, BAD]) | {SAMPLES: 8.0}


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


def test_a_step_that_is_skipped_in_part_is_counted_as_such_and_stays_in_the_row() -> None:
    """The same trajectories in one minibatch would have skipped all of it."""
    skips = Skips()
    assert [skips.took(m) for m in (IN_PART, BAD, GOOD, IN_PART, IN_PART)] == [True, False, True, True, True]
    assert skips.metrics() == {"steps_skipped": 1.0, "steps_skipped_in_part": 3.0, "samples_skipped": 24.0}
    with pytest.raises(NotFinite, match=r"3 training steps in a row were skipped, whole or in part.*nonfinite_loss"):
        skips.took(IN_PART)


def test_metrics_of_several_minibatches_are_those_of_the_applied_ones() -> None:
    found = combined([GOOD, BAD, {"loss": 1.5, "ratio_max": 3.0}, BAD])
    assert found == {"loss": 1.0, "ratio_max": 3.0, "skipped/nonfinite_loss": 2.0}
    assert was_applied(found)
    assert reasons(found) == ["nonfinite_loss"]
    assert not was_applied(combined([BAD, BAD]))
    assert not was_applied({})
