"""What a rollout or repair actor can be asked to do: the names of its methods."""

from enum import StrEnum


class Work(StrEnum):
    """Each is the method of `RolloutActor`, or `RepairActor`, that does it."""

    ROLLOUT = "rollout_group"
    EVALUATE = "evaluate"
    REPAIR = "repair"
