"""Groups that fail in a row: told at the first, counted, and ended by name once nothing under way may do better."""

import logging
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from small_group import TASK, trajectory

from autotraj.errors import GroupsFail, RunError
from autotraj.sampling.failures import (
    LEAST,
    ROUNDS,
    Failure,
    FailureReason,
    FailuresInARow,
    episode_failure,
    failure_of,
)
from trajectory.types import Group

TOO_LONG = Failure(
    "episode_error", "task t7: ValueError: the prompt has 812\n tokens, more than max_prompt_tokens = 400"
)


def group(**changes: object) -> Group:
    broken = replace(trajectory(1, "Multiply.", "6"), **changes)  # type: ignore[arg-type]
    return Group(lease_id="l", task=TASK, trajectories=(trajectory(0, "Multiply.", "6"), broken))


def test_what_is_wrong_with_a_group() -> None:
    assert failure_of(group()) is None
    late = failure_of(group(finish_reason="deadline", error="waited on the tool python"))
    assert late == Failure("episode_deadline", f"task {TASK.id}: waited on the tool python")
    assert late == episode_failure(group(finish_reason="deadline", error="waited on the tool python"))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_logprobs_that_are_no_numbers(number: float) -> None:
    whole = trajectory(1, "Multiply.", "6")
    logprobs = whole.logprobs.copy()
    logprobs[np.flatnonzero(whole.loss_mask)[0]] = number
    found = failure_of(group(logprobs=logprobs))
    assert found is not None
    assert found.reason == "nonfinite_logprobs"
    assert f"task {TASK.id}: 1 of {whole.num_generated_tokens} sampled tokens" in found.text
    # the environment's tokens have none
    assert failure_of(group(logprobs=np.where(whole.loss_mask, 0.0, number).astype(np.float32))) is None


def test_the_first_is_told_and_too_many_end_the_stage(caplog: pytest.LogCaptureFixture) -> None:
    failures = FailuresInARow("GRPO", num_in_flight=8)
    with caplog.at_level(logging.WARNING):
        for _ in range(3 * 8 - 2):
            failures.failed(TOO_LONG)
        failures.failed(Failure("nonfinite_logprobs", "task t9: 1 of 2"))
    assert [record.message.partition(":")[0] for record in caplog.records] == ["GRPO", "GRPO"]
    assert "the prompt has 812 tokens" in caplog.text
    assert not failures.too_many
    failures.check(idle=True)
    failures.failed(TOO_LONG)
    assert failures.too_many
    failures.check(idle=False)  # what is under way may still end the row
    with pytest.raises(GroupsFail) as caught:
        failures.check(idle=True)
    assert isinstance(caught.value, RunError)
    assert str(caught.value) == (
        "GRPO: the last 24 groups have all failed, 23 by episode_error, 1 by nonfinite_logprobs. The first by "
        "episode_error: task t7: ValueError: the prompt has 812 tokens, more than max_prompt_tokens = 400. Mend what it "
        "says; a prompt that is too long needs a larger episode.max_prompt_tokens"
    )


def test_one_success_ends_the_row() -> None:
    failures = FailuresInARow("GRPO", num_in_flight=1)
    for _ in range(5):
        for _ in range(LEAST - 1):
            failures.failed(TOO_LONG)
        failures.succeeded()
    failures.check(idle=True)
    failures.check_all()
    failures.failed(TOO_LONG)
    with pytest.raises(GroupsFail, match="the last 1 groups"):
        failures.check_all()


def test_one_outage_of_many_actors_ends_nothing() -> None:
    failures = FailuresInARow("GRPO", num_in_flight=500)
    for _ in range((ROUNDS - 1) * 500):
        failures.failed(TOO_LONG)
    failures.check(idle=True)


@pytest.mark.parametrize("reason", get_args(FailureReason))
def test_every_reason_has_a_remedy(reason: FailureReason) -> None:
    failures = FailuresInARow("GRPO", num_in_flight=1)
    failures.failed(Failure(reason, "text"))
    start, setting = {
        "episode_error": ("Mend what it says", "episode.max_prompt_tokens"),
        "episode_deadline": ("Raise", "episode.deadline_s"),
        "nonfinite_logprobs": ("The engine's weights", "engine.dtype"),
        "nonfinite_reward": ("Mend the part", "reward"),
        "reward_term_failed": ("Mend the function", "reward.terms_timeout_s"),
    }.get(reason, ("Mend the reward model's actor", "reward_model.when_unavailable = 'score-without'"))
    remedy = str(failures.error()).rpartition(": text. ")[2]
    assert remedy.startswith(start)
    assert setting in remedy
