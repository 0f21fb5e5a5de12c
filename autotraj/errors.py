"""Errors that end a run, in two kinds: those that the user can fix, and those of the run itself."""

from typing import Literal

ScoringReason = Literal[
    "nonfinite_reward", "reward_term_failed", "reward_model_timeout", "reward_model_refused", "reward_model_down"
]
"""Why a group has no rewards."""


class UserError(ValueError):
    """An error that the user can fix: in the configuration, or a missing part. The message names it and the remedy."""


class RunError(RuntimeError):
    """The run can't continue. It can be resumed from its last checkpoint once the cause is fixed."""


class OutOfMemory(RunError):
    """Actors of one kind were ended because of memory again after they had been replaced."""


class GateError(RunError):
    """After a weight sync, the engine and the learner compute different logprobs of the probe."""


class NothingToLearn(RunError):
    """In no group do the rewards differ any more. If the policy has taken steps, it is trained; if it has taken none, the
    run has failed."""


class GroupsFail(RunError):
    """All groups sampled in a row failed. The message says why and how often, gives the first failure, and what to
    change."""


class ScoringFailed(RunError):
    """A group has no rewards. `reason` and `term`, the name of the failed reward term if there is one, are for counting, and
    the message for people."""

    def __init__(self, reason: ScoringReason, message: str, *, term: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.term = term


class RewardNotFinite(ScoringFailed):
    """A reward is NaN or infinite. The message names the part that is."""

    def __init__(self, message: str) -> None:
        super().__init__("nonfinite_reward", message)


class RewardTermFailed(ScoringFailed):
    """A reward term of the user's own gave no numbers. The message says why."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__("reward_term_failed", message, term=name)


class NotFinite(RunError):
    """Several training steps in a row had no finite loss or gradient."""


class Stalled(RunError):
    """A deadline passed. The message says which part waited for what."""
