"""A trajectory's reward, part by part, by hand."""

import numpy as np
import pytest

from rewards.combine import score
from rewards.config import RewardConfig
from rewards.terms import REWARD_TERMS, overlong_penalty
from trajectory.types import Reward, Task, Trajectory

MATH = Task(id="m", question="?", golds=("5",))
QA = Task(id="q", question="?", golds=("Frank Lowy",), kind="qa")


def make_trajectory(text, finish_reason="answer", num_tokens=10):
    mask = np.ones(num_tokens + 3, dtype=bool)
    mask[2:5] = False  # a tool result
    return Trajectory(
        task_id="m",
        index=0,
        prompt_ids=np.zeros(2, dtype=np.int32),
        response_ids=np.zeros(num_tokens + 3, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.zeros(num_tokens + 3, dtype=np.float32),
        segments=(),
        turns=(),
        text=text,
        finish_reason=finish_reason,
    )


def answered(answer):
    return make_trajectory(f"<think>a</think><answer>\\boxed{{{answer}}}</answer>")


def test_math():
    config = RewardConfig()
    assert score(MATH, answered("5"), config) == Reward(
        total=1.0, parts={"outcome": 1.0, "format": 0.0}, correct=True, format_ok=True
    )
    assert score(MATH, answered("6"), config) == Reward(
        total=0.1, parts={"outcome": 0.0, "format": 0.1}, correct=False, format_ok=True
    )


def test_malformed_math_gets_nothing_even_if_right():
    reward = score(MATH, make_trajectory("<answer>\\boxed{5}</answer>"), RewardConfig())
    assert reward == Reward(
        total=0.0, parts={"outcome": 0.0, "format": 0.0}, correct=True, format_ok=False, notes=("no_think",)
    )


def test_an_answer_that_cannot_be_compared_is_wrong_and_says_why():
    reward = score(MATH, answered(f"x{'+1' * 600}"), RewardConfig())
    assert (reward.correct, reward.no_verdict) == (False, "too_long")
    assert reward.notes == ("no_verdict/too_long: an answer of more than 1000 characters isn't compared",)


def test_qa():
    config = RewardConfig()
    assert score(QA, answered("Frank Lowy"), config).total == 1.0
    partial = score(QA, answered("Sir Frank Lowy"), config)
    assert partial.parts == {"outcome": pytest.approx(0.8), "format": 0.0}
    assert partial.correct
    assert score(QA, answered("Paris"), config).total == 0.0
    cut_off = score(QA, make_trajectory("<think>a", finish_reason="length"), config)
    assert cut_off.total == -1.0
    assert cut_off.notes == ("unpaired_tag", "no_think", "no_answer")


def test_an_episode_that_ended_malformed_is_malformed_however_it_reads():
    text = "<think>a</think><answer>\\boxed{5}</answer>"
    reward = score(MATH, make_trajectory(text, finish_reason="malformed"), RewardConfig())
    assert (reward.total, reward.format_ok, reward.notes) == (0.0, False, ("malformed",))


def test_weights():
    config = RewardConfig(outcome_weight=2.0, wrong_but_well_formed=0.3, bad_format_math=-0.5, bad_format_qa=-2.0)
    assert score(MATH, answered("5"), config).total == 2.0
    assert score(MATH, answered("6"), config).total == 0.3
    assert score(MATH, make_trajectory("5"), config).total == -0.5
    assert score(QA, make_trajectory("5"), config).total == -2.0


def test_overlong_is_a_part_of_its_own():
    config = RewardConfig(overlong_buffer_tokens=4, overlong_limit_tokens=12)
    reward = score(MATH, answered("5"), config)  # 10 tokens of its own, 3 of a tool
    assert reward.parts == {"outcome": 1.0, "format": 0.0, "overlong": -0.5}
    assert reward.total == 0.5


@pytest.mark.parametrize(("num_tokens", "penalty"), [(0, 0.0), (80, 0.0), (85, -0.25), (100, -1.0), (150, -1.0)])
def test_overlong_penalty(num_tokens, penalty):
    assert overlong_penalty(num_tokens, limit=100, buffer=20) == penalty


def test_what_has_no_reward_is_refused():
    with pytest.raises(AssertionError, match="nothing to reward"):
        score(MATH, make_trajectory("", finish_reason="error"), RewardConfig())


def test_the_reward_models_part():
    config = RewardConfig()
    reward = score(MATH, answered("5"), config, rm=-1.0)
    assert reward.parts == {"outcome": 1.0, "format": 0.0, "trajectory": pytest.approx(-0.2)}
    assert reward.total == pytest.approx(0.8)
    assert score(MATH, answered("6"), config, rm=1.0).total == pytest.approx(0.3)
    malformed = score(MATH, make_trajectory("<answer>\\boxed{5}</answer>"), config, rm=2.0)
    assert (malformed.total, malformed.parts["trajectory"]) == (0.0, 0.0)


def test_the_papers_preset():
    """What the released code computes, whole trajectories through."""
    config = RewardConfig(preset="paper")
    assert score(QA, answered("Sir Frank Lowy"), config, rm=2.0).total == pytest.approx(0.8 + 0.2 * 2)
    assert score(QA, answered("Sir Frank Lowy"), config, rm=-2.0).total == pytest.approx(0.8)
    assert score(QA, answered("Frank Lowy"), config, rm=40.0).total == pytest.approx(3.0)
    assert score(QA, answered("Paris"), config, rm=40.0).total == 0.0
    assert score(QA, make_trajectory("<think>a"), config, rm=40.0).total == -1.0
    for rm in (None, -3.0, 3.0):
        assert score(MATH, answered("5"), config, rm=rm).total == 1.0
        assert score(MATH, answered("6"), config, rm=rm).total == 0.1
        cut_off = make_trajectory("<think>a</think>", finish_reason="length")
        assert score(MATH, cut_off, config, rm=rm).total == 0.0


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("task", [MATH, QA], ids=["math", "qa"])
@pytest.mark.parametrize("answer", ["5", "6", "Frank Lowy", "Frank", "Sir Frank Lowy of it"])
@pytest.mark.parametrize("rm", [None, -7.0, -0.3, 0.0, 0.7, 50.0])
def test_parts_add_up(preset, task, answer, rm):
    reward = score(task, answered(answer), RewardConfig(preset=preset), rm=rm)
    assert reward.total == sum(reward.parts.values())
    assert ("trajectory" in reward.parts) == (rm is not None)


def test_a_term_of_ones_own_is_a_function_and_a_line(monkeypatch):
    """Added from outside: it counts, and it stands in the breakdown under its name; where it is None it doesn't apply."""
    monkeypatch.setitem(
        REWARD_TERMS, "brevity", lambda given: 0.5 if given.trajectory.num_generated_tokens < 11 else None
    )
    text = "<think>a</think><answer>\\boxed{5}</answer>"
    short, long = (score(MATH, make_trajectory(text, num_tokens=n), RewardConfig()) for n in (10, 12))
    assert short.parts == {"outcome": 1.0, "format": 0.0, "brevity": 0.5}
    assert short.total == 1.5
    assert long.parts == {"outcome": 1.0, "format": 0.0}
