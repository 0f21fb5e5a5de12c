"""Settings of the cluster: how the number of rollout actors follows the work."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from trajectory.section import Section


class ElasticConfig(Section):
    """How many rollout actors there are while GRPO trains. The number is `rollout.num_actors` unless `max_actors` is set."""

    max_actors: NonNegativeInt = 0
    """Most rollout actors. 0: always `rollout.num_actors`."""

    min_actors: PositiveInt = 1
    """Fewest rollout actors."""

    grow_above: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Actors are added when the learners wait for groups during more than this share of the time."""

    shrink_above: float = Field(default=0.4, gt=0.0, lt=1.0)
    """An actor is removed when ready engines have no work, because staleness is at its bound, during more than this share of
    the time."""

    window_steps: PositiveInt = 3
    """Number of steps that a decision looks back on. Counting starts again after each change, once all engines are ready."""

    join_timeout_s: float = Field(default=1800.0, gt=0.0)
    """Longest wait for an added actor, seconds, including the time in which the autoscaler finds a machine. After that, the
    actor is given up."""

    @model_validator(mode="after")
    def _bounds(self) -> ElasticConfig:
        if self.max_actors and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors = {self.max_actors} is less than min_actors = {self.min_actors}")
        return self
