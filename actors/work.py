"""The kinds of work of rollout and repair actors: the names of their methods."""

from enum import StrEnum


class Work(StrEnum):
    """Each value is the name of the method of `RolloutActor` or `RepairActor` that does the work."""

    ROLLOUT = "rollout_group"
    EVALUATE = "evaluate"
    REPAIR = "repair"
