"""Settings of the cluster: how the rollout pool follows the work."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from trajectory.section import Section


class ElasticConfig(Section):
    """How many rollout actors there are while GRPO trains. Fixed at `rollout.num_actors` unless `max_actors` is set."""

    max_actors: NonNegativeInt = 0
    """Most rollout actors; 0: as many as `rollout.num_actors`, from beginning to end."""

    min_actors: PositiveInt = 1
    """Fewest rollout actors."""

    grow_above: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share of the time that the learners wait for groups above which actors are added."""

    shrink_above: float = Field(default=0.4, gt=0.0, lt=1.0)
    """Share of the time that ready engines have no work, because staleness is at its bound, above which one is let go."""

    window_steps: PositiveInt = 3
    """Steps that a decision looks back on; it begins anew after each change, once all asked-for engines are up."""

    join_timeout_s: float = Field(default=1800.0, gt=0.0)
    """Longest wait for an added actor, the time in which the autoscaler finds a machine included; then it is given up."""

    @model_validator(mode="after")
    def _bounds(self) -> ElasticConfig:
        if self.max_actors and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors = {self.max_actors} is less than min_actors = {self.min_actors}")
        return self
