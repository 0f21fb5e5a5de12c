"""What can end a run, named by who must act."""


class UserError(ValueError):
    """Something the user can mend: configuration, a missing part. The message names it and the remedy."""


class RunError(RuntimeError):
    """The run can't go on. It can be resumed from its last checkpoint once the cause is mended."""


class OutOfMemory(RunError):
    """Actors of one kind were ended for memory again after they had been replaced."""


class GateError(RunError):
    """After a weight sync the engine and the learner disagree about the probe's logprobs."""


class NothingToLearn(RunError):
    """No group tells its trajectories apart any more. A policy that took steps before is trained; without one the run has
    failed."""


class GroupsFail(RunError):
    """All that was sampled in a row failed; the message says why, how often, the first of it and what to change."""


class ScoringFailed(RunError):
    """A group has no rewards; the message says why. `reason` is a short name for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RewardNotFinite(ScoringFailed):
    """A reward is NaN or infinite; the message names the part that is."""

    def __init__(self, message: str) -> None:
        super().__init__("nonfinite_reward", message)


class NotFinite(RunError):
    """Several training steps in a row had no finite loss or gradient."""


class Stalled(RunError):
    """A deadline passed; the message says who waited on whom."""
