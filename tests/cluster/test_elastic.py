"""The rule that sizes the rollout pool: by hand, and against a simulated run."""

import math

import pytest

from cluster.config import ElasticConfig
from cluster.elastic import LoadMeter, Window, decide

CONFIG = ElasticConfig(min_actors=1, max_actors=8, grow_above=0.2, shrink_above=0.4, window_steps=3)


@pytest.mark.parametrize(
    ("wait", "idle", "now", "target"),
    [
        (0.25, 0.0, 3, 4),  # 3 / 0.75
        (0.5, 0.0, 3, 6),
        (0.9, 0.0, 3, 6),  # twofold at most
        (0.21, 0.0, 1, 2),  # 1 / 0.79, rounded up
        (0.5, 0.0, 6, 8),  # the bound
        (0.5, 0.0, 8, 8),
        (0.1, 0.1, 3, 3),  # between the thresholds
        (0.0, 0.5, 3, 2),
        (0.0, 0.5, 1, 1),  # the bound
        (0.5, 0.5, 3, 3),  # both wait: something else is slow, more engines won't help
    ],
)
def test_by_hand(wait: float, idle: float, now: int, target: int) -> None:
    assert decide(Window(3, wait, idle), now, 0, CONFIG).target == target


def test_nothing_moves_before_the_window_is_full_or_while_engines_join() -> None:
    assert decide(Window(2, 0.9, 0.0), 3, 0, CONFIG).target == 3
    decision = decide(Window(3, 0.9, 0.0), 3, 1, CONFIG)
    assert (decision.target, decision.reason) == (3, "1 engines are still joining")


def test_a_pool_below_its_minimum_is_filled_at_once() -> None:
    config = ElasticConfig(min_actors=4, max_actors=8)
    assert decide(Window(0, 0.0, 0.0), 2, 2, config).target == 4


def test_the_meter_weighs_by_time_and_engines() -> None:
    meter = LoadMeter()
    meter.passed(3.0, learners_wait=True, num_ready=2, num_idle=0)
    meter.passed(1.0, learners_wait=False, num_ready=4, num_idle=3)
    window, decision = meter.stepped(3, 0, CONFIG)
    assert window == meter.window == Window(1, 0.75, 0.3)  # 3 of 4 s; 3 of 10 engine seconds
    assert decision.target == 3


def test_a_window_that_was_decided_on_begins_anew() -> None:
    meter = LoadMeter()
    for step in range(1, 100):  # a hundred quiet steps
        meter.passed(1.0, learners_wait=False, num_ready=4, num_idle=0)
        window, decision = meter.stepped(4, 0, CONFIG)
        assert (window.num_steps, decision.target) == ((step - 1) % 3 + 1, 4)
    for _ in range(3):  # and then a load that has changed
        meter.passed(1.0, learners_wait=False, num_ready=4, num_idle=3)
        window, decision = meter.stepped(4, 0, CONFIG)
    assert (window, decision.target) == (Window(3, 0.0, 0.75), 3)


def test_what_is_seen_while_engines_join_is_forgotten() -> None:
    meter = LoadMeter()
    meter.passed(1.0, learners_wait=True, num_ready=2, num_idle=0)
    assert meter.stepped(4, 2, CONFIG)[1].reason == "2 engines are still joining"
    assert meter.window == Window(0, 0.0, 0.0)


def test_contradictory_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="max_actors = 2 is less than min_actors = 3"):
        ElasticConfig(min_actors=3, max_actors=2)


def simulate(
    engines: int, sampling_s: float, train_s: float, num_steps: int, meter: LoadMeter | None = None
) -> list[int]:
    """A run at staleness 1: a step's groups take `sampling_s` on one engine, a step `train_s` on the learners.

    Sampling of the next step and training overlap, so a step lasts as long as the slower of the two.
    """
    meter, sizes = meter or LoadMeter(), []
    for _ in range(num_steps):
        sample = sampling_s / engines
        step = max(sample, train_s)
        meter.passed(min(sample, train_s), learners_wait=False, num_ready=engines, num_idle=0)
        if sample < train_s:
            meter.passed(step - sample, learners_wait=False, num_ready=engines, num_idle=engines)
        else:
            meter.passed(step - train_s, learners_wait=True, num_ready=engines, num_idle=0)
        engines = meter.stepped(engines, 0, CONFIG)[1].target
        sizes.append(engines)
    return sizes


@pytest.mark.parametrize("sampling_s", [5.0, 10.0, 22.0, 60.0, 300.0])
@pytest.mark.parametrize("start", [1, 8])
def test_a_steady_load_ends_in_a_steady_pool_that_fits(sampling_s: float, start: int) -> None:
    sizes = simulate(start, sampling_s, 10.0, 60)
    assert len(set(sizes[-20:])) == 1, sizes  # it doesn't swing
    fitting = sampling_s / 10.0
    # Within what the thresholds leave alone: a fifth of waiting, two fifths of idling; and the bounds.
    assert max(1, min(8, math.floor(fitting * 0.8))) <= sizes[-1] <= max(1, min(8, math.ceil(fitting / 0.6))), sizes


def test_the_pool_follows_a_load_that_changes() -> None:
    meter = LoadMeter()
    grown = simulate(1, 40.0, 10.0, 300, meter)[-1]
    assert grown == 4
    shrunk = simulate(grown, 10.0, 10.0, 30, meter)  # in a tenth of the time that it was steady
    assert shrunk[-1] in (1, 2), shrunk
