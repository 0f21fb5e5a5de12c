"""The learning rate of each training step."""

import math

from learners.config import LearnerConfig


def learning_rate(step: int, config: LearnerConfig) -> float:
    """Learning rate of training step `step` (from 0): linear warm-up to `lr`, then constant or a half cosine down to 0.

    All minibatches of a batch use the same rate."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    assert config.total_steps is not None
    progress = min((step - config.warmup_steps) / (config.total_steps - config.warmup_steps), 1.0)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
