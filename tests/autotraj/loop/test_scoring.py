"""Scoring with the reward model when it answers, when another takes its place, and when it doesn't answer."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
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
from autotraj.sampling.scoring import evaluated_with_own_terms, score_group, with_own_terms
from rewards.config import RewardConfig
from rewards.own_terms import OwnTerms
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


OWN_TERMS = """
def noted(task, trajectory):
    return 2, "seen"

def spread(group):
    return [t.index + r.parts["noted"] for t, r in zip(group.trajectories, group.rewards, strict=True)]

def fails(task, trajectory):
    return float("nan")
"""


@pytest.fixture
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RewardConfig:
    (tmp_path / "own_terms_to_score.py").write_text(OWN_TERMS)
    monkeypatch.syspath_prepend(tmp_path)
    uses = [{"use": f"own_terms_to_score:{name}", "weight": 0.5} for name in ("noted", "spread", "fails")]
    return RewardConfig(terms=uses, terms_timeout_s=120.0)  # type: ignore[arg-type]


def test_own_terms_are_parts_of_the_reward_by_name(own_config: RewardConfig) -> None:
    """A trajectory that failed, as there may be in an evaluation, has none."""
    config = own_config.model_copy(update={"terms": own_config.terms[:2]})
    failed = replace(GROUP.trajectories[1], finish_reason="deadline", error="late")
    group = replace(GROUP, trajectories=(GROUP.trajectories[0], failed, *GROUP.trajectories[2:]))
    with closing(OwnTerms(config)) as own:
        scored = with_own_terms(score_group(group, config), own)
    assert [r.parts.get("spread") for r in scored.rewards] == [0.5, None, 1.5, 2.0]
    assert [r.notes for r in scored.rewards] == [("noted: seen",), ("late",), ("noted: seen",), ("noted: seen",)]
    assert scored.rewards[0].parts == {"outcome": 1.0, "format": 0.0, "noted": 1.0, "spread": 0.5}
    assert all(r.total == sum(r.parts.values()) for r in scored.rewards)


def test_an_own_term_that_fails_drops_the_group_by_its_name(
    own_config: RewardConfig, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger([GROUP.task], seed=0, max_attempts=3)
    lease = ledger.lease()
    failures = FailuresInARow("test", 4)
    with closing(OwnTerms(own_config)) as own:
        source = GroupSource(
            ledger,
            cast(RunnerPool, None),  # nothing is admitted
            lambda group: with_own_terms(score_group(group, own_config), own),
            failures=failures,
            seed_of=lambda lease: 0,
            timeout_s=60.0,
        )
        source.take(Finished(Work.ROLLOUT, lease.lease_id, GROUP))
        while source.num_scoring:
            assert list(source.collect()) == []
        source.close()
    assert ledger.drop_reasons == {"reward_term_failed:fails": 1}
    assert "(reward_term_failed:fails): task a: 'own_terms_to_score:fails' returned nan" in caplog.text
    assert "Mend the function that it names" in str(failures.error())


def test_an_evaluation_leaves_out_an_own_term_that_fails(
    own_config: RewardConfig, caplog: pytest.LogCaptureFixture
) -> None:
    scored = [score_group(GROUP, own_config)] * 3
    found = evaluated_with_own_terms(scored, own_config)
    assert {tuple(r.parts) for group in found for r in group.rewards} == {("outcome", "format", "noted", "spread")}
    assert "the evaluation is without the reward term fails" in caplog.text
