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


def test_batch_counts_groups_without_variance() -> None:
    """Twelve rewards, (1·4, 0·4, 1, 1, 1, 0.98): mean 7.98/12, Σr² = 7.9604; the deviation is 0.4915."""
    rewards = [np.ones(4), np.zeros(4), np.array([1.0, 1.0, 1.0, 0.98])]
    deviation = ((7.9604 - 7.98**2 / 12) / 11) ** 0.5 + 1e-4
    solved, failed, varied = group_relative(rewards, "batch")
    np.testing.assert_allclose(varied, np.array([0.005, 0.005, 0.005, -0.015]) / deviation, rtol=1e-5)
    np.testing.assert_allclose(varied, [0.0102, 0.0102, 0.0102, -0.0305], atol=1e-4)
    assert solved.tolist() == failed.tolist() == [0.0] * 4


def test_equal_rewards_have_no_advantage_at_all() -> None:
    """The mean of three times 0.1 + 0.2 is another number than 0.1 + 0.2."""
    (advantages,) = group_relative([np.full(3, 0.1 + 0.2)], "std")
    assert advantages.tolist() == [0.0, 0.0, 0.0]


def test_zero_variance_groups_are_recognised() -> None:
    assert [has_variance(g) for g in GROUPS] == [True, False, False]
    assert not has_variance(np.array([]))
    assert not has_variance(np.full(4, 0.1 + 0.2))
