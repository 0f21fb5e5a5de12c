import numpy as np

from learners.advantages import group_relative, has_variance

GROUPS = [np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.5, 0.5]), np.array([3.0])]


def test_std_by_hand() -> None:
    """Sample standard deviation of (1, 0, 0, 1) is √(1/3); groups without variance, and of one, give 0."""
    first, second, third = group_relative(GROUPS, "std")
    expected = 0.5 / ((1 / 3) ** 0.5 + 1e-4)
    np.testing.assert_allclose(first, [expected, -expected, -expected, expected], rtol=1e-6)
    assert second.tolist() == [0.0, 0.0]
    assert third.tolist() == [0.0]


def test_none_only_centres() -> None:
    assert [g.tolist() for g in group_relative(GROUPS, "none")] == [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0], [0.0]]


def test_batch_divides_by_the_deviation_of_all_rewards() -> None:
    """(1, 0, 0, 1, ½, ½, 3): mean 6/7, Σ(r − mean)² = 11.5 − 36/7."""
    expected = 0.5 / (((11.5 - 36 / 7) / 6) ** 0.5 + 1e-4)
    np.testing.assert_allclose(group_relative(GROUPS, "batch")[0], np.array([1, -1, -1, 1]) * expected, rtol=1e-6)


def test_zero_variance_groups_are_recognised() -> None:
    assert [has_variance(g) for g in GROUPS] == [True, False, False]
    assert not has_variance(np.array([]))
    assert not has_variance(np.full(4, 0.1 + 0.2))
