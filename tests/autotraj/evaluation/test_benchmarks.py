"""A policy's figures on a benchmark, by hand, and runs side by side."""

from pathlib import Path

import pytest
from rich.console import Console
from scored_samples import group, maths, trajectory

from autotraj.config.benchmarks import load_suite
from autotraj.errors import UserError
from autotraj.evaluation.benchmarks import BenchmarkResult, benchmark_result, exact_match, token_f1
from autotraj.evaluation.comparison import comparison_table, difference
from autotraj.evaluation.intervals import wilson
from tasks.config import TaskConfig
from tasks.load import load_tasks
from trajectory.types import Group, Task

DATA = Path(__file__).resolve().parents[4] / "shared/data"


def test_one_sample_a_problem() -> None:
    tasks = maths(4)
    answers = ["0", "1.0", "7", "3"]  # right and as written, right only by value, wrong, right
    groups = [
        group(task, trajectory(0, answer, num_tokens=10 * (i + 1), num_calls=i % 2))
        for i, (task, answer) in enumerate(zip(tasks, answers, strict=True))
    ]
    result = benchmark_result("base", "toy", groups)
    assert (result.num_problems, result.num_samples, result.num_failed) == (4, 1, 0)
    assert set(result.metrics) == {"accuracy", "exact_match", "tool_calls", "generated_tokens"}
    assert result.metrics["accuracy"] == wilson(3, 4)
    assert result.metrics["exact_match"] == wilson(2, 4)
    assert result.metrics["tool_calls"].value == 0.5
    assert result.metrics["generated_tokens"].value == 25.0
    assert result.metrics["generated_tokens"].low < 25.0 < result.metrics["generated_tokens"].high
    assert result.per_problem["accuracy"] == (1.0, 1.0, 0.0, 1.0)


def test_several_samples() -> None:
    zero, one = maths(2)
    groups = [
        group(zero, *(trajectory(i, a) for i, a in enumerate(["0", "5", "5", "5"]))),
        group(one, *(trajectory(i, a) for i, a in enumerate(["1", "1", "1", "5"]))),
    ]
    result = benchmark_result("base", "toy", groups)
    assert result.per_problem["accuracy"] == (0.25, 0.75)
    values = {name: estimate.value for name, estimate in result.metrics.items()}
    assert values["accuracy"] == values["avg@4"] == values["pass@1"] == 0.5
    # pass@2: 1 - C(3,2)/C(4,2) = 1/2, and 1 - C(1,2)/C(4,2) = 1. pass@4: both have a right one.
    assert values["pass@2"] == 0.75
    assert values["pass@4"] == 1.0
    assert result.metrics["accuracy"].low == 0.25, "problems are resampled, not samples"


def test_questions() -> None:
    lowy = Task(id="a", question="Who?", golds=("Frank Lowy", "Lowy"), kind="qa")
    yes = Task(id="b", question="Is it?", golds=("yes",), kind="qa")
    result = benchmark_result(
        "base", "qa", [group(lowy, trajectory(0, "the Frank P. Lowy")), group(yes, trajectory(0, "Yes!"))]
    )
    # "frank p lowy" and "frank lowy" share 2 of 3 + 2 words: 4/5.
    assert result.per_problem["f1"] == (pytest.approx(0.8), 1.0)
    assert result.per_problem["exact_match"] == (0.0, 1.0)
    assert result.metrics["accuracy"].value == 1.0


@pytest.mark.parametrize(
    ("answer", "task", "exact", "f1"),
    [
        ("The  Lowy, Frank", Task(id="", question="", golds=("Frank Lowy",), kind="qa"), False, 1.0),
        ("the frank LOWY.", Task(id="", question="", golds=("Paris", "Frank Lowy"), kind="qa"), True, 1.0),
        (None, Task(id="", question="", golds=("Paris",), kind="qa"), False, 0.0),
        ("\\dfrac12", Task(id="", question="", golds=("\\frac{1}{2}",)), True, 0.0),
        ("0.5", Task(id="", question="", golds=("\\frac{1}{2}",)), False, 0.0),
    ],
)
def test_exact_match_and_f1(answer: str | None, task: Task, exact: bool, f1: float) -> None:
    assert exact_match(answer, task) is exact
    if task.kind == "qa":
        assert token_f1(answer, task) == f1


def test_what_failed_counts_as_wrong_and_is_counted() -> None:
    zero, one = maths(2)
    groups = [group(zero, trajectory(0, "0")), group(one, trajectory(0, "1", reason="error"))]
    result = benchmark_result("base", "toy", groups)
    assert result.num_failed == 1
    assert result.metrics["accuracy"] == result.metrics["exact_match"] == wilson(1, 2)


def test_judged() -> None:
    zero, one, two = maths(3)
    groups = [group(task, trajectory(0, "x"), trajectory(1, "y")) for task in (zero, one, two)]
    verdicts = {
        ("m0", 0): True,
        ("m0", 1): "timeout",
        ("m1", 0): False,
        ("m1", 1): True,
        ("m2", 0): "timeout",
        ("m2", 1): "http_500",
    }
    result = benchmark_result("base", "toy", groups, verdicts=verdicts)
    assert result.per_problem["judged"] == (1.0, 0.5, None)
    assert result.metrics["judged"].value == 0.75
    assert result.judge_failures == {"http_500": 1, "timeout": 2}
    with pytest.raises(ValueError, match="task m2, trajectory 1: there is no verdict"):
        benchmark_result("base", "toy", groups, verdicts={k: v for k, v in verdicts.items() if k != ("m2", 1)})
    silent = benchmark_result("base", "toy", groups, verdicts=dict.fromkeys(verdicts, "connection"))
    assert "judged" not in silent.metrics
    assert silent.judge_failures == {"connection": 6}


def test_a_result_goes_through_json() -> None:
    zero, one = maths(2)
    result = benchmark_result(
        "base",
        "toy",
        [group(zero, trajectory(0, "0")), group(one, trajectory(0, "1"))],
        verdicts={("m0", 0): True, ("m1", 0): "timeout"},
    )
    assert BenchmarkResult.from_json(result.to_json()) == result
    with pytest.raises(ValueError, match="run: Field required"):
        BenchmarkResult.from_json('{"metrics": {}}')


def test_what_cannot_be_measured_is_named() -> None:
    zero, one = maths(2)
    scored = group(zero, trajectory(0, "0"))
    with pytest.raises(ValueError, match="no problems"):
        benchmark_result("r", "toy", [])
    with pytest.raises(ValueError, match="task m0 isn't scored"):
        benchmark_result("r", "toy", [Group(lease_id="", task=zero, trajectories=scored.trajectories)])
    with pytest.raises(ValueError, match="task m1 has 2 samples, the first task 1"):
        benchmark_result("r", "toy", [scored, group(one, trajectory(0, "0"), trajectory(1, "0"))])
    with pytest.raises(ValueError, match="m0 occurs twice"):
        benchmark_result("r", "toy", [scored, scored])


def result_of(run: str, correct: list[int], benchmark: str = "toy") -> BenchmarkResult:
    groups = [
        group(task, trajectory(0, task.golds[0] if i in correct else "wrong")) for i, task in enumerate(maths(20))
    ]
    return benchmark_result(run, benchmark, groups)


def test_difference_is_paired_whatever_the_order() -> None:
    base, trained = result_of("base", [0, 1, 2]), result_of("trained", list(range(15)))
    change = difference(base, trained, "accuracy")
    assert change.value == pytest.approx(12 / 20)
    assert 0 < change.low < 0.6 < change.high
    back = list(reversed(range(20)))
    shuffled = BenchmarkResult.from_json(trained.to_json())
    object.__setattr__(shuffled, "problem_ids", tuple(trained.problem_ids[i] for i in back))
    object.__setattr__(shuffled, "per_problem", {k: tuple(v[i] for i in back) for k, v in trained.per_problem.items()})
    assert difference(base, shuffled, "accuracy") == change
    with pytest.raises(ValueError, match="weren't measured on the same problems"):
        difference(base, result_of("other", [0], "another"), "accuracy")
    with pytest.raises(ValueError, match="f1 wasn't measured in both base and trained"):
        difference(base, trained, "f1")


def test_the_table_of_runs() -> None:
    base, trained = result_of("base", [0, 1, 2]), result_of("trained", list(range(15)))
    console = Console(width=140, record=True, force_terminal=False)
    console.print(comparison_table([[base, result_of("base", [1], "second")], [trained]]))
    text = console.export_text()
    assert "20 problems × 1" in text
    assert "15.0 % (5.2 to 36.0)" in text  # Wilson, 3 of 20
    assert "75.0 % (53.1 to 88.8)" in text  # and 15 of 20
    assert "Δ +60.0 % (" in text
    assert "10.0 (10.0 to 10.0)" in text, "tokens are no percentage"
    with pytest.raises(ValueError, match="base: a benchmark occurs twice"):
        comparison_table([[base, base]])


def test_the_real_files_are_measured_in_their_formats() -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} isn't there")
    for name, kind in (("gsm8k_train.jsonl", "math"), ("hotpotqa_200.jsonl", "qa")):
        tasks = load_tasks(TaskConfig(source=str(DATA / name), kind=kind, limit=100))
        groups = [group(task, trajectory(0, task.golds[0])) for task in tasks]
        result = benchmark_result("gold", name, groups)
        assert result.metrics["accuracy"] == wilson(100, 100)


def test_the_suite_of_benchmarks(tmp_path: Path) -> None:
    suite = load_suite(Path(__file__).resolve().parents[3] / "examples/benchmarks.toml")
    names = [benchmark.name for benchmark in suite.benchmarks]
    assert len(names) == 10
    assert {b.name for b in suite.benchmarks if b.data.kind == "math"} == {
        "aime24",
        "aime25",
        "math500",
        "amc23",
        "gsm8k",
    }
    assert [b.name for b in suite.benchmarks if b.judged] == ["hle"]
    assert suite.judge is not None

    path = tmp_path / "b.toml"
    path.write_text('[[benchmarks]]\nname = "a"\njudged = true\n[benchmarks.data]\nsource = "a.jsonl"\n')
    with pytest.raises(UserError, match=r"a: judged = true needs a \[judge\] section"):
        load_suite(path)
    path.write_text('[[benchmarks]]\nname = "a"\nnum_samples = 4\n[benchmarks.data]\n')
    with pytest.raises(UserError, match=r"benchmarks\.0: a: num_samples = 4 at temperature 0"):
        load_suite(path)
    with pytest.raises(UserError, match="no such file"):
        load_suite(tmp_path / "absent.toml")
