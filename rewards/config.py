"""What a trajectory is rewarded for."""

from pydantic import Field

from trajectory.config import Section


class RewardConfig(Section):
    """The defaults are the paper's format and outcome rewards (arXiv 2601.23032, stage 2)."""

    outcome_weight: float = Field(default=1.0, ge=0)
    """Times the outcome of a well-formed trajectory: 1 or 0 for math, the token F1 for QA."""

    wrong_but_well_formed: float = 0.1
    """What a well-formed math trajectory with a wrong answer gets for its form."""

    bad_format_math: float = 0.0
    """All that a malformed math trajectory gets, be its answer right or wrong."""

    bad_format_qa: float = -1.0
    """All that a malformed QA trajectory gets."""

    overlong_buffer_tokens: int = Field(default=0, ge=0)
    """DAPO's soft overlong punishment: within this many tokens below `overlong_limit_tokens` the reward falls by up to 1.
    0 turns it off."""

    overlong_limit_tokens: int = Field(default=2048, ge=1)
    """The length, in tokens that the model wrote, from which the punishment is 1. Tool results don't count."""

    math_timeout_s: float = Field(default=3.0, gt=0)
    """How long math-verify may take to compare two answers; after it they count as different."""
