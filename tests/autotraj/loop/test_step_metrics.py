"""What a step reports, and what it trains on, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from autotraj.evaluation.evaluate import summarize
from autotraj.loop.training_batch import assemble
from autotraj.sampling.metrics import describe_groups
from learners.config import LossConfig
from trajectory.types import Group, Reward, Segment, Task, ToolCall, ToolResult, Trajectory, Turn


def trajectory(index: int, num_tokens: int, version: int, *, tool: bool = False) -> Trajectory:
    call = ToolCall(tool="python", content="print(1)") if tool else None
    result = ToolResult(status="ok", output="1", duration_s=0.5) if tool else None
    turn = Turn(text="x", start=0, end=num_tokens, result_end=num_tokens, tool_call=call, tool_result=result)
    return Trajectory(
        task_id="t",
        index=index,
        prompt_ids=np.array([1, 2], np.int32),
        response_ids=np.arange(num_tokens, dtype=np.int32),
        loss_mask=np.ones(num_tokens, np.bool_),
        logprobs=np.full(num_tokens, -0.5, np.float32),
        segments=(Segment(start=0, end=num_tokens, policy_version=version),) if num_tokens else (),
        turns=(turn,) if num_tokens else (),
        text="x",
        finish_reason="answer",
        duration_s=2.0,
    )


def group(name: str, rewards: list[float], trajectories: list[Trajectory]) -> Group:
    return Group(
        lease_id=name,
        task=Task(id="t", question="q", golds=("1",)),
        trajectories=tuple(trajectories),
        rewards=tuple(Reward(total=r, parts={"outcome": r}, correct=r >= 1.0, format_ok=True) for r in rewards),
    )


@pytest.fixture
def groups() -> list[Group]:
    varied = group("a", [1.0, 0.0], [trajectory(0, 4, version=3, tool=True), trajectory(1, 2, version=2)])
    constant = group("b", [1.0, 1.0], [trajectory(0, 3, version=3), trajectory(1, 3, version=3)])
    return [varied, constant]


def test_means_over_trajectories(groups: list[Group]) -> None:
    metrics = describe_groups(groups, policy_version=4)
    assert metrics["num_trajectories"] == 4
    assert metrics["reward_mean"] == pytest.approx(0.75)
    assert metrics["accuracy"] == pytest.approx(0.75)
    assert metrics["tool_call_rate"] == pytest.approx(0.25)
    assert metrics["tool/ok"] == 1.0
    assert metrics["tool_seconds_mean"] == pytest.approx(0.5)
    assert metrics["generated_tokens"] == 12
    assert metrics["staleness_mean"] == pytest.approx((1 + 2 + 1 + 1) / 4)
    assert metrics["staleness_max"] == 2
    assert metrics["finish/answer"] == 1.0


def test_answers_without_a_verdict_are_counted_by_reason(groups: list[Group]) -> None:
    undecided = replace(groups[0].rewards[1], notes=("no_code",), no_verdict="timeout")
    groups[0] = replace(groups[0], rewards=(groups[0].rewards[0], undecided))
    metrics = describe_groups(groups, policy_version=4)
    assert {k: v for k, v in metrics.items() if k.startswith("no_verdict")} == {"no_verdict/timeout": 0.25}


def test_no_groups_is_no_metrics() -> None:
    assert describe_groups([], policy_version=0) == {"num_trajectories": 0.0}


def test_groups_without_variance_are_sent_with_no_advantage(groups: list[Group]) -> None:
    """So they count in the denominators, and are held to the reference of a KL penalty."""
    batch = assemble(groups, LossConfig(advantage_scale="none"), 3)
    assert batch.num_no_variance == 1
    assert batch.has_gradient
    assert [s.advantage for s in batch.samples] == [0.5, -0.5, 0.0, 0.0]
    assert [len(s) for s in batch.samples] == [2 + 4, 2 + 2, 2 + 3, 2 + 3]
    assert [s.on_policy for s in batch.samples] == [True, False, True, True]


def test_a_trajectory_of_two_policies_is_not_on_policy(groups: list[Group]) -> None:
    """Its later tokens were sampled with keys and values of the older weights."""
    both = (Segment(start=0, end=1, policy_version=2), Segment(start=1, end=4, policy_version=3))
    first, second = groups[0].trajectories
    mixed = replace(groups[0], trajectories=(replace(first, segments=both), second))
    for version, expected in ((3, [False, False]), (2, [False, True])):
        assert [s.on_policy for s in assemble([mixed], LossConfig(), version).samples] == expected


def test_the_deviation_of_a_batch_is_that_of_all_its_rewards() -> None:
    rewards = {"a": [1.0] * 4, "b": [0.0] * 4, "c": [1.0, 1.0, 1.0, 0.98]}
    groups = [group(name, r, [trajectory(i, 2, version=0) for i in range(4)]) for name, r in rewards.items()]
    batch = assemble(groups, LossConfig(advantage_scale="batch"), 0)
    assert [s.advantage for s in batch.samples] == pytest.approx([0.0] * 8 + [0.0102] * 3 + [-0.0305], abs=1e-4)


def test_a_step_without_variance_has_a_gradient_only_by_its_kl(groups: list[Group]) -> None:
    alike = [g for g in groups if len({r.total for r in g.rewards}) == 1]
    assert not assemble(alike, LossConfig(), 3).has_gradient
    assert assemble(alike, LossConfig(kl_estimator="k3", kl_coef=0.1), 3).has_gradient


def test_a_trajectory_that_sampled_nothing_counts_as_a_sequence() -> None:
    batch = assemble(
        [group("a", [1.0, 0.0], [trajectory(0, 2, version=0), trajectory(1, 0, version=0)])], LossConfig(), 0
    )
    assert [s.num_loss_tokens for s in batch.samples] == [2, 0]


def test_evaluation_figures(groups: list[Group]) -> None:
    result = summarize("base", groups, seconds=1.0)
    assert result.accuracy == pytest.approx(0.75)  # problems score 0.5 and 1.0
    assert result.accuracy_ci95 == 0.25  # two problems drawn with replacement: 0.5, 0.75 or 1, with 1/4, 1/2, 1/4
    assert (result.num_problems, result.num_failed) == (2, 0)
    assert "groups" not in result.summary()


def test_an_accuracy_of_problems_that_are_right_or_wrong_has_wilsons_interval(groups: list[Group]) -> None:
    """Also where all are right, of which the normal approximation says ± 0."""
    right = [g for g in groups if all(r.correct for r in g.rewards)]
    assert len(right) == 1
    assert summarize("base", right, seconds=1.0).accuracy_ci95 == pytest.approx((1 - 0.2065) / 2, abs=1e-4)
