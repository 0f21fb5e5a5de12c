"""The figures of a policy on one benchmark, with confidence intervals, from sampled and scored groups."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter, ValidationError

from autotraj.evaluation.intervals import Estimate, bootstrap_mean, pass_at_k, share
from rewards import math_text, outcome
from trajectory import markup
from trajectory.types import Group, Reward, Task, Trajectory

Verdicts = Mapping[tuple[str, int], bool | str]
"""(task id, trajectory index) → the judge's verdict, or the name of the failure (see `judge.judge`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """One policy on one benchmark. `per_problem` has the values of which every estimate is the mean, for paired comparisons.

    Metrics, each a mean over problems of the mean over a problem's samples: `accuracy` (as rewarded), `exact_match`, `f1`
    (token F1, QA only), `judged`, `avg@n` (accuracy of n > 1 samples) and `pass@k`; `tool_calls` and `generated_tokens` for
    each trajectory. A trajectory that failed for reasons outside the policy counts as wrong, and in `num_failed`.

    Intervals: Wilson's for values that are 0 or 1 on each problem, else the bootstrap over problems.
    """

    run: str
    benchmark: str
    num_problems: int
    num_samples: int  # for each problem
    num_failed: int  # trajectories that ended in an error or at their deadline
    metrics: dict[str, Estimate]
    problem_ids: tuple[str, ...]
    per_problem: dict[str, tuple[float | None, ...]]  # by metric, in the order of `problem_ids`; None: no verdict
    judge_failures: dict[str, int] = field(default_factory=dict)  # by name; they are left out of `judged`

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> BenchmarkResult:
        """The result from the text of `to_json`. Raises ValueError for any other text."""
        try:
            found = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
        num_ids = {name: len(values) for name, values in found.per_problem.items()}
        if wrong := [name for name, count in num_ids.items() if count != len(found.problem_ids)]:
            raise ValueError(
                f"per_problem.{wrong[0]} has {num_ids[wrong[0]]} values for {len(found.problem_ids)} problems"
            )
        return found


def benchmark_result(
    run: str, benchmark: str, groups: Sequence[Group], *, verdicts: Verdicts | None = None, seed: int = 0
) -> BenchmarkResult:
    """The figures of scored `groups`, one for each problem, all with the same number n ≥ 1 of samples.

    `verdicts` None: there is no judge. `seed` is that of the bootstrap. Raises ValueError, naming the task, for unscored
    groups, unequal numbers of samples, a problem that occurs twice, a missing verdict, and an empty list.
    """
    num_samples = _check(benchmark, groups)
    scored = [list(zip(group.trajectories, group.rewards, strict=True)) for group in groups]
    per_problem: dict[str, list[float | None]] = {
        "accuracy": [_mean([float(_correct(t, r)) for t, r in problem]) for problem in scored],
        "exact_match": [
            _mean([float(exact_match(_answer(t), group.task)) for t in group.trajectories]) for group in groups
        ],
    }
    if all(group.task.kind == "qa" for group in groups):
        per_problem["f1"] = [_mean([token_f1(_answer(t), group.task) for t in group.trajectories]) for group in groups]
    failures: Counter[str] = Counter()
    if verdicts is not None:
        per_problem["judged"] = [_judged(group, verdicts, failures) for group in groups]
    if num_samples > 1:
        per_problem[f"avg@{num_samples}"] = per_problem["accuracy"]
    for k in _ks(num_samples):
        per_problem[f"pass@{k}"] = [pass_at_k(num_samples, sum(_correct(t, r) for t, r in p), k) for p in scored]
    per_problem["tool_calls"] = [_mean([float(t.num_tool_calls) for t in g.trajectories]) for g in groups]
    per_problem["generated_tokens"] = [_mean([float(t.num_generated_tokens) for t in g.trajectories]) for g in groups]
    return BenchmarkResult(
        run=run,
        benchmark=benchmark,
        num_problems=len(groups),
        num_samples=num_samples,
        num_failed=sum(t.failed for group in groups for t in group.trajectories),
        metrics={name: e for name, values in per_problem.items() if (e := _estimate(name, values, seed)) is not None},
        problem_ids=tuple(group.task.id for group in groups),
        per_problem={name: tuple(values) for name, values in per_problem.items()},
        judge_failures=dict(sorted(failures.items())),
    )


def exact_match(answer: str | None, task: Task) -> bool:
    """Whether an answer is a gold one as text: for QA lower-cased, without punctuation and articles; for math cleaned."""
    if answer is None:
        return False
    if task.kind == "math":
        return any(math_text.prepare(answer).compact == math_text.prepare(gold).compact for gold in task.golds)
    return any(outcome.normalise(answer) == outcome.normalise(gold) for gold in task.golds)


def token_f1(answer: str | None, task: Task) -> float:
    """Token F1 with the best gold answer."""
    return 0.0 if answer is None else max(outcome.qa_f1(answer, gold) for gold in task.golds)


def _check(benchmark: str, groups: Sequence[Group]) -> int:
    if not groups:
        raise ValueError(f"{benchmark}: there are no problems to measure on")
    num_samples = len(groups[0].trajectories)
    seen: set[str] = set()
    for group in groups:
        if len(group.rewards) != len(group.trajectories):
            raise ValueError(f"{benchmark}: the group of task {group.task.id} isn't scored")
        if len(group.trajectories) != num_samples or not num_samples:
            raise ValueError(
                f"{benchmark}: task {group.task.id} has {len(group.trajectories)} samples, the first task {num_samples}"
            )
        if group.task.id in seen:
            raise ValueError(f"{benchmark}: task {group.task.id} occurs twice")
        seen.add(group.task.id)
    return num_samples


def _ks(num_samples: int) -> list[int]:
    """Powers of two up to the number of samples, and that number; empty for a single sample."""
    if num_samples == 1:
        return []
    return sorted({2**i for i in range(num_samples.bit_length())} & set(range(num_samples + 1)) | {num_samples})


def _judged(group: Group, verdicts: Verdicts, failures: Counter[str]) -> float | None:
    """Share of a problem's verdicts that are yes, without failures; None if there are only failures."""
    values: list[float] = []
    for trajectory in group.trajectories:
        verdict = verdicts.get((group.task.id, trajectory.index))
        if verdict is None:
            raise ValueError(f"task {group.task.id}, trajectory {trajectory.index}: there is no verdict of the judge")
        if isinstance(verdict, str):
            failures[verdict] += 1
        else:
            values.append(float(verdict))
    return _mean(values) if values else None


def _estimate(name: str, values: Sequence[float | None], seed: int) -> Estimate | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    estimate = bootstrap_mean if name in ("tool_calls", "generated_tokens") else share
    return estimate(known, seed=seed)


def _answer(trajectory: Trajectory) -> str | None:
    return None if trajectory.failed else markup.final_answer(trajectory.text)


def _correct(trajectory: Trajectory, reward: Reward) -> bool:
    return reward.correct and not trajectory.failed


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
