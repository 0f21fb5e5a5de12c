"""Dr. GRPO (arXiv 2503.20783, sec. 3.2): without a bias towards short answers or towards easy and hard questions."""

from learners.losses.objective import PolicyObjective, clipped_surrogate, sum_over_constant_length

DR_GRPO = PolicyObjective(
    name="dr_grpo",
    clip_range=(0.2, 0.2),
    ratio_level="token",
    token_loss=clipped_surrogate,
    mean=sum_over_constant_length,
    advantage_scale="none",
    needs_length=True,
)
