"""Scoring with the reward model when it answers, when another takes its place, and when it doesn't answer."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from small_group import GROUP

from actors.reward_model.actor import Scores
from actors.work import Work
from autotraj.errors import RewardNotFinite
from autotraj.loop.reward_service import RewardModelUnavailable, Served
from autotraj.loop.scoring import VERSION_METRIC, Scorer
from autotraj.runners.calls import Finished
from autotraj.runners.pool import RunnerPool
from autotraj.sampling.failures import FailuresInARow
from autotraj.sampling.groups import GroupSource
from autotraj.sampling.scoring import score_group
from rewards.config import RewardConfig
from trajectory.ledger import Ledger


class Service:
    """Stands in for the actor at its transport: what it returns, when it fails, which version it is."""

    def __init__(self, values: Sequence[float], version: int = 1) -> None:
        self.values, self.version, self.path, self.num_restarts = values, version, "model", 0
        self.down = False
        self.answers_as: int | None = None

    @property
    def served(self) -> Served:
        return Served(self.path, self.version)

    def score(self, sequences: Sequence[Any]) -> Scores:
        if self.down:
            raise RewardModelUnavailable("reward_model_timeout", "a caller waited 60 s for RewardModelActor(0)")
        assert [len(ids) for ids in sequences] == [4] * 4  # prompt 2 + the model's own 2 of 3
        return Scores(values=np.array(self.values, np.float32), version=self.answers_as or self.version)

    def replace(self, path: str, version: int) -> None:
        self.path, self.version = path, version


def scorer(service: Service, *, required: bool = True, preset: str = "default") -> Scorer:
    return Scorer(RewardConfig(preset=preset), service, mask_results=True, required=required)


def test_the_better_of_two_right_answers_earns_more_and_the_wrong_one_least() -> None:
    scored = scorer(Service([2.0, 0.0, 1.0, 3.0])).score(GROUP)
    totals = [reward.total for reward in scored.rewards]
    assert totals[0] > totals[2] > totals[1] > totals[3]
    assert scored.metrics[VERSION_METRIC] == 1.0
    assert all(reward.total == pytest.approx(sum(reward.parts.values())) for reward in scored.rewards)


def test_another_model_is_measured_by_a_scale_of_its_own() -> None:
    service = Service([0.0, 1.0, 2.0, 3.0])
    one = scorer(service)
    before = one.score(GROUP)
    service.values, service.version = [1000.0, 1001.0, 1002.0, 1003.0], 2
    after = one.score(GROUP)
    assert [r.parts["trajectory"] for r in after.rewards] == pytest.approx(
        [r.parts["trajectory"] for r in before.rewards]
    )
    assert after.metrics[VERSION_METRIC] == 2.0


def test_a_model_that_does_not_answer_stops_the_group_or_is_named_on_every_reward() -> None:
    service = Service([])
    service.down = True
    with pytest.raises(RewardModelUnavailable, match="waited 60 s"):
        scorer(service).score(GROUP)
    lenient = scorer(service, required=False)
    scored = lenient.score(GROUP)
    assert all("scored without the reward model" in reward.notes[-1] for reward in scored.rewards)
    assert all("trajectory" not in reward.parts for reward in scored.rewards)
    assert VERSION_METRIC not in scored.metrics
    assert lenient.metrics()["groups_scored_without"] == 1.0


def test_a_resumed_scorer_goes_on_with_the_same_model_and_scale() -> None:
    service = Service([0.0, 1.0, 2.0, 3.0], version=3)
    one = scorer(service)
    one.score(GROUP)
    state = one.state()
    fresh_service = Service([1.5, 1.5, 1.5, 1.5])
    fresh = scorer(fresh_service)
    fresh.restore(state, "where it is now")
    assert fresh_service.served == Served("where it is now", 3)
    expected = one._norm.normalise(1.5)
    service.values = fresh_service.values = [1.5] * 4
    assert fresh._norm.normalise(1.5) == pytest.approx(expected)


def test_a_scorer_that_is_set_back_serves_the_older_model_and_measures_by_its_scale() -> None:
    service = Service([0.0, 1.0, 2.0, 3.0], version=3)
    one = scorer(service)
    before = one.score(GROUP)
    state = one.state()
    service.values, service.version = [1000.0, 1001.0, 1002.0, 1003.0], 4
    one.score(GROUP)
    one.restore(state, "three")
    assert service.served == Served("three", 3)
    service.values, service.answers_as = [5000.0] * 4, 4  # a call that was under way
    one.score(GROUP)
    service.values, service.answers_as = [0.0, 1.0, 2.0, 3.0], None
    assert [r.parts["trajectory"] for r in one.score(GROUP).rewards] == pytest.approx(
        [r.parts["trajectory"] for r in before.rewards], rel=0.2
    )
    one.restore(None, "configured")
    assert service.served == Served("configured", 1)


def test_a_checkpoint_between_a_refresh_and_its_first_score_keeps_no_scale_of_the_model_before() -> None:
    service = Service([0.0, 1.0, 2.0, 3.0])
    one = scorer(service)
    one.score(GROUP)
    service.replace("two", 2)
    state = one.state()
    fresh_service = Service([1000.0, 1001.0, 1002.0, 1003.0])
    fresh = scorer(fresh_service)
    fresh.restore(state, "two")
    parts = [reward.parts["trajectory"] for reward in fresh.score(GROUP).rewards]
    assert parts[0] < parts[1] < parts[2]  # measured by the first model's they would all be clipped to the same


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_told_with_its_term(number: float) -> None:
    """Not taken for a group without variance. The configuration lets none through, so it is changed behind its back."""
    broken = RewardConfig().model_copy(update={"wrong_but_well_formed": number})
    message = rf"^the reward of trajectory 3 of task a is {number}: its part 'format' is {number}$"
    with pytest.raises(RewardNotFinite, match=message):
        score_group(GROUP, broken)
    with pytest.raises(RewardNotFinite, match=r"^the reward of trajectory \d of task a is "):
        Scorer(broken, Service([0.0, 1.0, 2.0, 3.0]), mask_results=True, required=True).score(GROUP)
    ledger = Ledger([GROUP.task], seed=0, max_attempts=3)
    lease = ledger.lease()
    source = GroupSource(
        ledger,
        cast(RunnerPool, None),  # nothing is admitted
        lambda group: score_group(group, broken),
        failures=FailuresInARow("test", 4),
        seed_of=lambda lease: 0,
        timeout_s=60.0,
    )
    source.take(Finished(Work.ROLLOUT, lease.lease_id, GROUP))
    while source.num_scoring:
        assert list(source.collect()) == []
    source.close()
    assert ledger.drop_reasons == {"nonfinite_reward": 1}
