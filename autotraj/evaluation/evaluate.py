"""Measures a policy: samples the evaluation tasks on the rollout actors, scores them, and computes intervals."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from actors.work import Work
from autotraj.config.run import EvalConfig
from autotraj.errors import Stalled
from autotraj.evaluation.intervals import bootstrap_mean, share
from autotraj.runners.calls import Failed
from autotraj.runners.pool import RunnerPool
from autotraj.sampling.failures import FailuresInARow, episode_failure
from autotraj.sampling.metrics import describe_groups
from autotraj.sampling.scoring import evaluated_with_own_terms, score_group
from rewards.config import RewardConfig
from trajectory.types import Group, Task

logger = logging.getLogger(__name__)

POLL_S = 0.25
MAX_ATTEMPTS = 3
"""How often a problem is sampled whose episodes end in an error. After that the errors stay and count as failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """The result of one evaluation. Trajectories that failed for reasons outside the policy count as wrong."""

    name: str
    accuracy: float  # mean over all sampled trajectories
    accuracy_ci95: float  # half of the interval, see `intervals.share`
    num_problems: int
    num_failed: int  # trajectories that ended in an error or at their deadline
    num_asked_again: int  # problems that were sampled again after a lost actor or an error in an episode
    tool_call_rate: float
    mean_reward: float
    mean_reward_ci95: float  # half of the interval, by the bootstrap over problems
    seconds: float
    groups: tuple[Group, ...] = field(default=(), repr=False)

    def summary(self) -> dict[str, float | str | int]:
        """Everything except the trajectories, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "groups"}


def evaluate(
    name: str,
    pool: RunnerPool,
    tasks: Sequence[Task],
    config: EvalConfig,
    reward: RewardConfig,
    *,
    seed: int,
    max_concurrent_episodes: int,
    call_timeout_s: float,
    patience_s: float,
) -> EvalResult:
    """Sample `config.num_samples` trajectories of each task on all ready runners. Runners may be lost meanwhile.

    A problem depends on `seed` and on its place in `tasks`, not on the runner. Problems of a lost runner are sampled again;
    the pool decides how often a runner may be lost. `call_timeout_s` bounds the wait for one problem.

    Raises:
        Stalled: nothing came back for `patience_s`.
        GroupsFail: every episode failed, of all problems or of too many in a row, so there is nothing to measure.
        RewardNotFinite: a reward is NaN or infinite.
        RunError: the pool gave up.
    """
    started = last_progress = time.monotonic()
    waiting, attempts, found = deque(range(len(tasks))), Counter[int](), dict[int, Group]()
    # Twice as many problems as fill a runner, so that some can sample while others wait for tools.
    per_runner = 2 * max_concurrent_episodes // config.num_samples + 1
    failures, any_answer = FailuresInARow(f"evaluating {name}", per_runner * pool.num_runners), False
    while len(found) < len(tasks):
        room = 0 if failures.too_many else per_runner * pool.num_ready - pool.num_in_flight(Work.EVALUATE)
        for _ in range(min(len(waiting), room)):
            runner_id = pool.idle_slot()
            assert runner_id is not None, "there is room only on ready runners"
            index = waiting.popleft()
            attempts[index] += 1
            pool.submit(
                runner_id,
                str(index),
                Work.EVALUATE,
                timeout_s=call_timeout_s,
                tasks=[tasks[index]],
                num_samples=config.num_samples,
                temperature=config.temperature,
                seed=seed + index,
            )
        for outcome in pool.poll(POLL_S):
            if outcome.method != Work.EVALUATE:  # a call of a loop that has ended
                continue
            last_progress, index = time.monotonic(), int(outcome.key)
            if isinstance(outcome, Failed):
                logger.warning("%s: problem %s is sampled again: %s", name, tasks[index].id, outcome.reason)
                waiting.append(index)
                continue
            (group,) = outcome.value
            if (failure := episode_failure(group)) and all(t.failed for t in group.trajectories):
                failures.failed(failure)
            else:
                failures.succeeded()
                any_answer = True
            if attempts[index] < MAX_ATTEMPTS and any(t.finish_reason == "error" for t in group.trajectories):
                waiting.append(index)
            else:
                found[index] = group
        failures.check(idle=pool.num_in_flight(Work.EVALUATE) == 0)
        pool.restore()
        if time.monotonic() - last_progress > patience_s:
            raise Stalled(
                f"evaluating {name}: nothing came back for {patience_s:.0f} s, {len(found)} of {len(tasks)} problems are "
                f"sampled: {pool.describe()}"
            )
    if not any_answer:
        failures.check_all()
    scored = [score_group(found[index], reward) for index in range(len(tasks))]
    scored = evaluated_with_own_terms(scored, reward)
    num_asked_again = sum(count - 1 for count in attempts.values())
    return summarize(name, scored, seconds=time.monotonic() - started, num_asked_again=num_asked_again)


def summarize(name: str, groups: Sequence[Group], *, seconds: float, num_asked_again: int = 0) -> EvalResult:
    """The figures of scored `groups`, one for each problem."""
    metrics = describe_groups(groups, policy_version=0)
    per_problem = [sum(r.correct for r in g.rewards) / len(g.rewards) for g in groups]
    rewards = [sum(r.total for r in g.rewards) / len(g.rewards) for g in groups]
    return EvalResult(
        name=name,
        accuracy=sum(per_problem) / len(per_problem) if per_problem else 0.0,
        accuracy_ci95=share(per_problem).half_width if per_problem else 0.0,
        num_problems=len(per_problem),
        num_failed=sum(t.failed for g in groups for t in g.trajectories),
        num_asked_again=num_asked_again,
        tool_call_rate=metrics.get("tool_call_rate", 0.0),
        mean_reward=metrics.get("reward_mean", 0.0),
        mean_reward_ci95=bootstrap_mean(rewards).half_width if rewards else 0.0,
        seconds=seconds,
        groups=tuple(groups),
    )
