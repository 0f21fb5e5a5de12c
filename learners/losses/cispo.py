"""CISPO (arXiv 2506.13585, eq. 4): the clipped, detached weight times the log-likelihood, with no lower clip limit."""

from learners.losses.objective import PolicyObjective, clipped_weight, mean_of_tokens

CISPO = PolicyObjective(
    name="cispo",
    clip_range=(1.0, 4.0),
    ratio_level="token",
    token_loss=clipped_weight,
    mean=mean_of_tokens,
    advantage_scale="std",
    needs_length=False,
)
