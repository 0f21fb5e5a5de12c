"""GRPO (arXiv 2402.03300, eq. 3): a mean over sequences of token means."""

from learners.losses.objective import PolicyObjective, clipped_surrogate, mean_of_sequence_means

GRPO = PolicyObjective(
    name="grpo",
    clip_range=(0.2, 0.2),
    ratio_level="token",
    token_loss=clipped_surrogate,
    mean=mean_of_sequence_means,
    advantage_scale="std",
    needs_length=False,
)
