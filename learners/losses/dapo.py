"""DAPO (arXiv 2503.14476, eq. 8): a mean over all tokens, and a clip range that is wider upwards ("clip-higher")."""

from learners.losses.objective import PolicyObjective, clipped_surrogate, mean_of_tokens

DAPO = PolicyObjective(
    name="dapo",
    clip_range=(0.2, 0.28),
    ratio_level="token",
    token_loss=clipped_surrogate,
    mean=mean_of_tokens,
    advantage_scale="std",
    needs_length=False,
)
