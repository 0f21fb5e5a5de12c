"""Confidence intervals of measured figures. Pure functions on numpy.

Proportions of independent trials have Wilson's score interval. Means over problems have the percentile bootstrap over whole
problems, whatever was measured on each, since samples of one problem aren't independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_CHUNK_DRAWS = 1 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval, for a figure with ±. Near 0 and 1 the interval isn't symmetric."""
        return (self.high - self.low) / 2


def share(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean of shares in [0, 1] over problems: with Wilson's interval if all are 0 or 1, else with the bootstrap.

    Raises ValueError without values.
    """
    if all(value in (0.0, 1.0) for value in values):
        return wilson(int(sum(values)), len(values))
    return bootstrap_mean(values, seed=seed)


def wilson(successes: int, trials: int) -> Estimate:
    """A proportion of independent trials (Wilson 1927). Raises ValueError without trials."""
    from scipy.stats import binomtest  # the import takes a second

    if trials < 1:
        raise ValueError("a proportion needs at least one trial")
    found = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return Estimate(successes / trials, float(found.low), float(found.high))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of one value for each problem: 2.5 % and 97.5 % quantiles of the means of `resamples` draws with replacement.

    The same values and seed give the same interval. Raises ValueError without values.
    """
    if not values:
        raise ValueError("a mean needs at least one problem")
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_DRAWS // len(array))  # so that no array is large, whatever the number of problems
    means: list[NDArray[np.float64]] = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, len(array), (min(rows, resamples - start), len(array)))
        means.append(array[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean of `second` − `first` over the same problems in the same order, by the paired bootstrap."""
    return bootstrap_mean([b - a for a, b in zip(first, second, strict=True)], seed=seed)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that one of k samples is right, unbiased: 1 − C(n − c, k) / C(n, k) (arXiv 2107.03374, eq. 1)."""
    assert 0 <= num_correct <= num_samples
    assert 1 <= k <= num_samples
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
