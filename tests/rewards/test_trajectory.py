"""The reward model's part: the released formula by hand, and the bounds of ours on generated cases."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rewards.config import RewardConfig
from rewards.outcome import AnswerScore
from rewards.trajectory import RunningNorm, bounded, paper_qa, trajectory_part

PAPER = RewardConfig(preset="paper")
RIGHT, WRONG = AnswerScore(1.0, True), AnswerScore(0.0, False)
scores = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("f1", "rm", "reward"),
    [
        (0.8, 1.0, 1.0),  # 0.8 + 0.2
        (0.8, -4.0, 0.8),  # 0.8 - 0.8 = 0 would be lower: the outer max takes it back
        (0.5, 20.0, 3.0),  # 0.5 + 4.0, clipped
        (0.5, -100.0, 0.5),
        (0.0, 50.0, 0.0),  # no words shared: the model isn't asked
        (1.0, 0.0, 1.0),
    ],
)
def test_the_papers_formula(f1, rm, reward):
    assert paper_qa(f1, rm, 0.2) == pytest.approx(reward)
    assert f1 + trajectory_part("qa", AnswerScore(f1, f1 >= 0.5), rm, PAPER) == pytest.approx(reward)


@given(f1=st.floats(0, 1), rm=scores)
def test_the_papers_formula_never_lowers(f1, rm):
    assert f1 <= paper_qa(f1, rm, 0.2) <= 3.0


@given(rm=scores)
def test_the_paper_has_no_trajectory_reward_for_math(rm):
    assert trajectory_part("math", RIGHT, rm, PAPER) == trajectory_part("math", WRONG, rm, PAPER) == 0.0


@pytest.mark.parametrize(
    ("kind", "result", "normalised", "part"),
    [
        ("math", RIGHT, 1.5, 0.3),
        ("math", RIGHT, -1.5, -0.3),
        ("math", RIGHT, 9.0, 0.4),  # clipped to two deviations
        ("math", RIGHT, -9.0, -0.4),  # 0.6 stays above the boundary, (1 + 0.1) / 2
        ("math", WRONG, 9.0, 0.4),  # 0.5 stays below it
        ("math", WRONG, -0.25, -0.05),
        ("math", WRONG, -9.0, -0.1),  # not below a malformed one's 0
        ("qa", AnswerScore(0.5, True), -1.0, 0.0),  # just right: it can't fall
        ("qa", AnswerScore(0.5, True), 1.0, 0.2),
        ("qa", AnswerScore(0.45, False), 1.0, 0.05),  # up to the boundary, 0.5
        ("qa", WRONG, -2.0, -0.4),  # far above a malformed one's -1
        ("qa", RIGHT, -9.0, -0.4),
    ],
)
def test_ours_raises_and_lowers_within_its_bounds(kind, result, normalised, part):
    assert trajectory_part(kind, result, normalised, RewardConfig()) == pytest.approx(part)


@st.composite
def configs(draw):
    outcome_weight = draw(st.floats(0, 10))
    wrong = draw(st.floats(0, outcome_weight))
    return RewardConfig(
        outcome_weight=outcome_weight,
        wrong_but_well_formed=wrong,
        bad_format_math=draw(st.floats(-5, wrong)),
        bad_format_qa=draw(st.floats(-5, 0)),
        trajectory_weight=draw(st.floats(0, 100)),
        trajectory_clip=draw(st.floats(0.1, 100)),
    )


@given(
    config=configs(),
    kind=st.sampled_from(["math", "qa"]),
    f1s=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    a=scores,
    b=scores,
)
def test_the_model_never_lifts_a_wrong_answer_above_a_right_one(config, kind, f1s, a, b):
    if kind == "math":
        right, wrong = RIGHT, WRONG
        bases = config.outcome_weight, config.wrong_but_well_formed
        malformed = config.bad_format_math
    else:
        low, high = sorted(f1s)
        right, wrong = AnswerScore(max(high, 0.5), True), AnswerScore(min(low, 0.499), False)
        bases = config.outcome_weight * right.value, config.outcome_weight * wrong.value
        malformed = config.bad_format_qa
    reward_right = bases[0] + bounded(kind, right, a, config)
    reward_wrong = bases[1] + bounded(kind, wrong, b, config)
    assert malformed - 1e-9 <= reward_wrong <= reward_right + 1e-9


@given(a=scores, b=scores, kind=st.sampled_from(["math", "qa"]), f1=st.floats(0, 1))
def test_a_better_score_never_means_less(a, b, kind, f1):
    result = AnswerScore(f1, f1 >= 0.5) if kind == "qa" else (RIGHT if f1 >= 0.5 else WRONG)
    low, high = sorted((a, b))
    assert bounded(kind, result, low, RewardConfig()) <= bounded(kind, result, high, RewardConfig())


@pytest.mark.parametrize("rm", [math.nan, math.inf])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_score_that_is_no_number_is_refused(preset, rm):
    with pytest.raises(ValueError, match="broken model or checkpoint"):
        trajectory_part("qa", RIGHT, rm, RewardConfig(preset=preset))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "paper", "trajectory_weight": 0.5}, "means trajectory_weight = 0.2, not 0.5"),
        ({"preset": "paper", "overlong_buffer_tokens": 5}, "means overlong_buffer_tokens = 0, not 5"),
        ({"preset": "paper", "trajectory_clip": 3.0}, "trajectory_clip"),
        ({"wrong_but_well_formed": 1.5}, "wrong answers would be rewarded above right ones"),
        ({"bad_format_math": 0.2}, "malformed trajectories would be rewarded above"),
        ({"bad_format_qa": 0.2}, "malformed trajectories would be rewarded above"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        RewardConfig(**settings)


def test_a_resolved_paper_configuration_reads_back():
    assert RewardConfig(**PAPER.model_dump()) == PAPER


def test_normalising_by_hand():
    norm = RunningNorm(clip=2.0)
    assert norm.normalise(5.0) == 0.0, "nothing is known yet"
    norm.update([1.0])
    assert norm.normalise(5.0) == 0.0, "one value has no deviation"
    norm.update([3.0, 5.0])  # mean 3, deviation 2
    assert (norm.mean, norm.deviation) == (pytest.approx(3.0), pytest.approx(2.0))
    assert norm.normalise(4.0) == pytest.approx(0.5)
    assert (norm.normalise(99.0), norm.normalise(-99.0)) == (2.0, -2.0)
    norm.update([])
    assert norm.mean == pytest.approx(3.0)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=7), max_size=20), st.floats(-1e9, 1e9))
def test_batches_add_up_to_the_whole_even_far_from_zero(batches, offset):
    norm = RunningNorm(clip=2.0)
    values = [value + offset for batch in batches for value in batch]
    for batch in batches:
        norm.update([value + offset for value in batch])
    if len(values) > 1:
        assert norm.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
        assert norm.deviation == pytest.approx(statistics.stdev(values), rel=1e-4, abs=1e-5)


def test_equal_scores_say_nothing():
    norm = RunningNorm(clip=2.0)
    norm.update([0.1] * 1000)
    assert norm.normalise(0.1 + 1e-12) == 0.0


def test_the_past_fades():
    norm = RunningNorm(clip=5.0, memory=100)
    norm.update([-1.0, 1.0] * 500)
    assert norm.deviation == pytest.approx(1.0, rel=1e-2), "forgetting leaves the deviation as it is"
    for _ in range(100):
        norm.update([9.0, 11.0] * 10)
    assert norm.mean == pytest.approx(10.0, abs=1e-6)
    assert norm.deviation == pytest.approx(1.0, rel=0.02)


def test_state_goes_on_where_it_was():
    norm, again = RunningNorm(clip=2.0), RunningNorm(clip=2.0)
    norm.update([1.0, 2.0, 4.0])
    again.restore(norm.state())
    for n in (norm, again):
        n.update([8.0])
    assert again.state() == norm.state()
    assert again.normalise(3.0) == norm.normalise(3.0)


def test_a_batch_with_a_broken_score_changes_nothing():
    norm = RunningNorm(clip=2.0)
    norm.update([1.0, 2.0])
    before = norm.state()
    with pytest.raises(ValueError, match="isn't finite"):
        norm.update([3.0, math.nan])
    assert norm.state() == before
