"""Confidence intervals and pass@k, against published and hand-computed numbers."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotraj.evaluation.intervals import Estimate, bootstrap_mean, paired_difference, pass_at_k, share, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == Estimate(
        successes / trials, pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5)
    )


def test_bootstrap_is_near_the_normal_interval_and_repeatable() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400).tolist()
    estimate = bootstrap_mean(values)
    half = 1.96 * float(np.std(values)) / math.sqrt(400)
    assert estimate.value == pytest.approx(np.mean(values))
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.1)
    assert bootstrap_mean(values) == estimate
    assert bootstrap_mean(values, seed=1) != estimate


def test_a_share_is_wilsons_where_problems_are_right_or_wrong() -> None:
    assert share([1.0, 0.0, 1.0, 1.0]) == wilson(3, 4)
    assert share([1.0, 0.5, 0.0]) == bootstrap_mean([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="at least one"):
        share([])


def test_bootstrap_of_little() -> None:
    assert bootstrap_mean([0.3]) == Estimate(0.3, 0.3, 0.3)
    # Two problems, 0 and 1: the mean of a draw is 0, 1/2 or 1 with 1/4, 1/2, 1/4.
    assert bootstrap_mean([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)


def test_many_problems_in_chunks() -> None:
    estimate = bootstrap_mean([0.0, 1.0] * 500_000, resamples=20)
    assert estimate.low < 0.5 < estimate.high
    assert estimate.high - estimate.low < 0.004


def test_pairing_takes_the_problems_own_difficulty_out() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0, 1, 300)
    first, second = difficulty.tolist(), (difficulty + 0.02).tolist()
    change = paired_difference(first, second)
    assert change == Estimate(pytest.approx(0.02), pytest.approx(0.02), pytest.approx(0.02))
    alone = bootstrap_mean(second)
    assert alone.low < bootstrap_mean(first).value, "unpaired, the two would overlap"


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 0, 4, 0.0), (4, 1, 4, 1.0), (10, 3, 5, 1 - 21 / 252)],
)
def test_pass_at_k(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets))
