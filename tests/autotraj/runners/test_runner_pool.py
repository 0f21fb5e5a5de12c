"""The pool over the loss of its actors, which are real Ray actors without an engine: they answer, die and come back."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from tiny_run import tiny

from actors.engine.protocol import GateAnswer
from autotraj.config.run import EvalConfig
from autotraj.errors import GateError, GroupsFail, UserError
from autotraj.evaluation.evaluate import EvalResult, evaluate
from autotraj.interrupt import Interrupt
from autotraj.runners.gate import Gate
from autotraj.runners.pool import RunnerPool
from autotraj.stages.synthesize import SynthesisPass, read_journal
from models.checksums import Checksums, HeldSums
from models.weight_update import LogprobProbe
from rewards.config import RewardConfig
from trajectory.types import Group, Task, Trajectory

pytestmark = pytest.mark.ray

TASKS = [Task(id=f"task-{i}", question=f"{i} + 0?", golds=(str(i),)) for i in range(30)]


class Stand:
    """In the place of a rollout actor."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    async def start(self) -> None:
        """Raises ValueError where the test left a file `refuse`."""
        with (self._folder / "starts").open("a") as file:
            file.write("x")
        if (self._folder / "refuse").exists():
            raise ValueError("engine.model: no such model")

    async def evaluate(self, tasks: list[Task], num_samples: int, temperature: float, seed: int) -> list[Group]:
        (task,) = tasks
        with (self._folder / task.id).open("a") as file:
            file.write(f"{seed}\n")
        if task.id == "task-7" and not (self._folder / "killed").exists():
            (self._folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [self._group(f"eval/{task.id}", task)]

    async def rollout_group(self, lease_id: str, task: Task, seed: int) -> Group:
        return self._group(lease_id, task)

    def _group(self, lease_id: str, task: Task) -> Group:
        """A failure where the test left a file `fail`, which may name the one task that doesn't."""
        fail = self._folder / "fail"
        failed = fail.exists() and fail.read_text() != task.id
        trajectory = Trajectory(
            task_id=task.id,
            index=0,
            prompt_ids=np.array([1], np.int32),
            response_ids=np.array([2], np.int32),
            loss_mask=np.ones(1, np.bool_),
            logprobs=np.zeros(1, np.float32),
            segments=(),
            turns=(),
            text="x",
            finish_reason="error" if failed else "answer",
            error="ValueError: the prompt has 9 tokens, more than max_prompt_tokens = 8" if failed else "",
            duration_s=1.0,
        )
        return Group(lease_id=lease_id, task=task, trajectories=(trajectory,))

    async def init_weight_transfer(self, info: dict[str, object]) -> None:
        """Joins nothing: there is no NCCL here."""

    async def update_weights(self, update: list[ray.ObjectRef]) -> None:
        """Holds what it gets, unless the test left a file `drops`."""
        if not (self._folder / "drops").exists():
            self._held = await update[0]

    async def answer_gate(self, token_ids: list[int], names: list[str]) -> GateAnswer:
        held = HeldSums(sums={name: self._held[name] for name in names}, unknown={})
        return GateAnswer(logprobs=np.zeros(len(token_ids) - 1, np.float32), held=held, sums_s=0.0)

    def ping(self) -> str:
        return "pong"

    def apply(self, func: object) -> object:
        return func(self)  # type: ignore[operator]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers can't import a test
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def pool_of(folder: Path, gate: Gate | None = None) -> RunnerPool:
    actors = [
        ray.remote(Stand).options(num_cpus=1, max_restarts=-1, max_concurrency=100).remote(str(folder))
        for _ in range(2)
    ]
    return RunnerPool(
        FaultTolerantActorManager(actors, max_remote_requests_in_flight_per_actor=1000),
        start_timeout_s=60.0,
        sync_timeout_s=60.0,
        gate=gate,
    )


def sampled(pool: RunnerPool, tasks: Sequence[Task] = TASKS) -> EvalResult:
    return evaluate(
        "policy",
        pool,
        tasks,
        EvalConfig(num_samples=1),
        RewardConfig(),
        seed=100,
        max_concurrent_episodes=8,
        call_timeout_s=60.0,
        patience_s=60.0,
    )


def test_an_evaluation_outlives_an_actor_and_samples_every_problem_once(ray_cluster: None, tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    pool.start()
    pool.wait_ready()
    result = sampled(pool)
    assert [group.task.id for group in result.groups] == [task.id for task in TASKS]
    assert result.num_asked_again >= 1
    pool.wait_ready()  # the evaluation may have ended without the actor that came back
    assert pool.num_restarts == 1
    for index, task in enumerate(TASKS):  # a problem's seed is its own, whoever samples it and however often
        assert set((tmp_path / task.id).read_text().split()) == {str(100 + index)}


def test_a_start_that_can_not_succeed_is_said_at_once(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    pool = pool_of(tmp_path)
    pool.start()
    with pytest.raises(UserError, match=r"^rollout actor \d failed in start: ValueError: engine.model: no such model$"):
        pool.wait_ready()
    assert len((tmp_path / "starts").read_text()) <= 2, "no actor was started twice"


def test_an_engine_that_drops_an_update_ends_the_run_and_says_what_it_holds(ray_cluster: None, tmp_path: Path) -> None:
    pool = pool_of(tmp_path, Gate("float32"))
    pool.start()
    for version, sums in enumerate(({"q": 1, "norm": 3}, {"q": 2, "norm": 3})):
        probe = LogprobProbe(policy_version=version, token_ids=(1, 2), logprobs=np.zeros(1, np.float32))
        pool.push(ray.put(sums), probe, Checksums(policy_version=version, dtype="float32", sums=sums))
        pool.wait_ready()
    assert pool.gate is not None
    assert pool.gate.metrics["sync/tensors_unchecked"] == 0
    (tmp_path / "drops").touch()
    newest = {"q": 5, "norm": 3}
    probe = LogprobProbe(policy_version=2, token_ids=(1, 2), logprobs=np.zeros(1, np.float32))
    pool.push(ray.put(newest), probe, Checksums(policy_version=2, dtype="float32", sums=newest))
    with pytest.raises(
        GateError, match=r"rollout actor \d does not hold .* 1 of 2 tensors differ: q \(it holds q of version 1\)"
    ):
        pool.wait_ready()


class Learners:
    """In the place of the learners' end of an NCCL broadcast, whose phases end when the test says so."""

    done = False

    def open_broadcast(self, num_engine_workers: int) -> tuple[dict[str, object], "Learners"]:
        return {"rank_offset": 1}, self

    def broadcast(self) -> "Learners":
        return self

    def poll(self) -> bool | None:
        return self.done or None


@pytest.mark.parametrize("when", ["while it joins", "when it has joined"])
def test_a_runner_that_is_dismissed_within_a_round_leaves_after_it(
    ray_cluster: None, tmp_path: Path, when: str
) -> None:
    pool, learners = pool_of(tmp_path, Gate("float32")), Learners()
    pool.start()
    pool.wait_ready()
    pool.use_broadcast(learners, workers_per_engine=1, learners_train=lambda: False)
    probe = LogprobProbe(policy_version=0, token_ids=(1, 2), logprobs=np.zeros(1, np.float32))
    pool.push(ray.put({"q": 1}), probe, Checksums(policy_version=0, dtype="float32", sums={"q": 1}))
    assert pool.broadcasting
    deadline = time.monotonic() + 60
    while when == "when it has joined" and any(view.oldest_s for view in pool.views()):
        assert time.monotonic() < deadline, pool.describe()
        pool.poll(0.1)
    left = pool.dismiss()
    learners.done = True
    while pool.num_ready < 1 or left in {view.runner_id for view in pool.views()}:
        assert time.monotonic() < deadline, pool.describe()
        pool.poll(0.1)
    assert not pool.broadcasting
    assert pool.num_runners == 1


WHY = (
    r"the last \d+ groups have all failed, \d+ by episode_error\. The first by episode_error: task task-\d+: "
    r"ValueError: the prompt has 9 tokens, more than max_prompt_tokens = 8\. Mend what it says"
)


@pytest.mark.parametrize("num_tasks", [3, 30])
def test_an_evaluation_of_failures_alone_is_no_measurement(ray_cluster: None, tmp_path: Path, num_tasks: int) -> None:
    pool = pool_of(tmp_path)
    pool.start()
    pool.wait_ready()
    (tmp_path / "fail").touch()
    with pytest.raises(GroupsFail, match="^evaluating policy: " + WHY):
        sampled(pool, TASKS[10 : 10 + num_tasks])
    (tmp_path / "fail").write_text("task-11")
    assert sampled(pool, TASKS[10:14]).num_failed == 3


@pytest.mark.parametrize("num_tasks", [3, 30])
def test_stage_one_ends_where_every_question_fails(ray_cluster: None, tmp_path: Path, num_tasks: int) -> None:
    pool = pool_of(tmp_path)
    pool.start()
    pool.wait_ready()
    (tmp_path / "fail").touch()
    config = tiny(tmp_path, "rollout.max_concurrent_episodes=8", "synthesis.num_candidates=4")
    synthesis = SynthesisPass(config, tmp_path, pool, pool, rollout_timeout_s=60.0, on_progress=lambda progress: None)
    with pytest.raises(GroupsFail, match="^synthesize: " + WHY):
        synthesis.run(TASKS[:num_tasks], Interrupt())
    assert read_journal(tmp_path) == []
