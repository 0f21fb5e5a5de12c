"""What of RLlib's own configuration `GRPOConfig` refuses, because nothing would read it."""

import pytest

from autotraj.grpo_config import GRPOConfig


def test_settings_of_rllib_that_nothing_reads_are_refused_with_ours() -> None:
    config = GRPOConfig()
    with pytest.raises(ValueError, match=r"training\(lr\) would be ignored: .* sections learner, loss and grpo"):
        config.training(lr=123)
    with pytest.raises(ValueError, match=r"environment\(env\) would be ignored: .* sections data and episode"):
        config.environment("CartPole-v1")


def test_a_config_without_a_run_says_what_to_call() -> None:
    with pytest.raises(ValueError, match=r"no run to build from: call run\(run_config"):
        GRPOConfig().build_algo()
