"""GSPO (arXiv 2507.18071, eq. 5): one ratio for each sequence."""

from learners.losses.objective import PolicyObjective, clipped_surrogate, mean_of_sequence_means

GSPO = PolicyObjective(
    name="gspo",
    clip_range=(3e-4, 4e-4),
    ratio_level="sequence",
    token_loss=clipped_surrogate,
    mean=mean_of_sequence_means,
    advantage_scale="std",
    needs_length=False,
)
