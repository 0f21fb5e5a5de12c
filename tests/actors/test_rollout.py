"""The rollout actor as RLlib makes it: a remote `EnvRunner` with a real engine, up to its engine's death."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from tiny_qwen3 import build_model, build_tokenizer

from actors.config import EngineConfig, EpisodeConfig, RolloutConfig, RolloutSettings
from actors.engine.protocol import EngineDead
from actors.rollout import RolloutActor
from models.checksums import checksum
from models.weight_update import WeightUpdate
from trajectory.types import Task

pytestmark = [pytest.mark.engine, pytest.mark.ray]

TASK = Task(id="t", question="2+3?", golds=("5",))
NO_GATEWAY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def group(model_path: Path) -> Iterator[EnvRunnerGroup]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 1024**2, log_to_driver=False
    )
    config = AlgorithmConfig()
    config.rollout_settings = RolloutSettings(
        engine=EngineConfig(model=str(model_path), max_model_len=1024, cpu_kv_cache_gib=1),
        episode=EpisodeConfig(system_prompt="", max_prompt_tokens=100, max_response_tokens=900),
        rollout=RolloutConfig(group_size=3),
        sandbox_address=NO_GATEWAY,
    )
    config.env_runners(env_runner_cls=RolloutActor, num_env_runners=1, create_local_env_runner=False)
    config.fault_tolerance(restart_failed_env_runners=True)
    try:
        group = EnvRunnerGroup(config=config, local_env_runner=False)
        ray.get(group._worker_manager.actors()[1].start.remote(), timeout=240)
        yield group
    finally:
        ray.shutdown()


def actor_of(group: EnvRunnerGroup) -> Any:
    return group._worker_manager.actors()[1]


def engine_of(pid: int) -> psutil.Process:
    """The engine's process below an actor whose start has returned. By parent's id: `children` compares start times, and
    those move with the clock of a virtual machine. vLLM's title of it isn't relied on: it was seen missing once."""
    below = {p: p.info["cmdline"] or [""] for p in psutil.process_iter(["ppid", "cmdline"]) if p.info["ppid"] == pid}
    engines = [
        p for p, line in below.items() if line[0].startswith("VLLM") or any("spawn_main" in word for word in line)
    ]
    assert len(engines) == 1, f"not one engine below {pid}: {list(below.values())}"
    return engines[0]


def test_groups_and_new_weights(group: EnvRunnerGroup) -> None:
    actor = actor_of(group)
    first = ray.get(actor.rollout_group.remote(lease_id="a", task=TASK, seed=1), timeout=60)
    assert (first.lease_id, first.task, first.min_policy_version) == ("a", TASK, 0)
    assert [t.index for t in first.trajectories] == [0, 1, 2]
    for trajectory in first.trajectories:
        assert trajectory.error == ""
        assert len(trajectory.response_ids) == len(trajectory.loss_mask) == len(trajectory.logprobs) > 0
        assert trajectory.segments[-1].end == len(trajectory.response_ids)

    model = build_model(len(build_tokenizer()), seed=1)
    state = model.state_dict()
    update = WeightUpdate(
        policy_version=3,
        backend="host",
        names=tuple(state),
        dtypes=("float32",) * len(state),
        shapes=tuple(tuple(tensor.shape) for tensor in state.values()),
        payload={name: (tensor.numpy(), "float32") for name, tensor in state.items()},
    )
    report = ray.get(actor.update_weights.remote([ray.put(update)]), timeout=60)
    assert (report.policy_version, report.num_kept) == (3, 0)

    ids = list(range(50))
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
    expected = logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0].numpy()
    answer = ray.get(actor.answer_gate.remote(ids, list(state)), timeout=60)
    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)
    assert answer.held.sums == {name: int(checksum(tensor, torch.float32)) for name, tensor in state.items()}
    assert answer.held.unknown == {}

    (evaluated,) = ray.get(actor.evaluate.remote([TASK], num_samples=2, temperature=0.0, seed=0), timeout=60)
    one, two = evaluated.trajectories
    assert one.response_ids.tolist() == two.response_ids.tolist()
    assert evaluated.min_policy_version == 3

    (stats,) = group.foreach_env_runner(lambda runner: runner.stats(), local_env_runner=False, timeout_seconds=30)
    assert stats["policy_version"] == 3
    assert stats["episodes_finished"] == 5
    assert stats["episodes_in_flight"] == 0


def test_an_exception_reaches_the_caller_at_once(group: EnvRunnerGroup) -> None:
    """RLlib's own `apply` would sleep for a minute and end the actor."""
    started = time.monotonic()
    ref = actor_of(group).apply.remote(lambda runner: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ray.get(ref, timeout=30)
    assert time.monotonic() - started < 10
    assert group.foreach_env_runner(lambda runner: repr(runner), local_env_runner=False) == ["RolloutActor(1)"]


def test_a_dead_engine_fails_its_calls_then_the_actor_restarts(group: EnvRunnerGroup) -> None:
    actor = actor_of(group)
    pid = ray.get(actor.apply.remote(lambda runner: __import__("os").getpid()), timeout=30)
    core = engine_of(pid)
    refs = [actor.rollout_group.remote(lease_id=f"d{i}", task=TASK, seed=i) for i in range(64)]
    while not ray.get(actor.stats.remote(), timeout=30)["requests_in_flight"]:
        assert ray.wait(refs, num_returns=len(refs), timeout=0)[1], "all were done before one was seen"
    core.kill()
    killed = time.monotonic()
    errors = []
    for ref in [*refs, actor.rollout_group.remote(lease_id="late", task=TASK, seed=0)]:
        with suppress(ray.exceptions.RayActorError):  # the late one may find nobody
            try:
                group_of = ray.get(ref, timeout=60)
                assert {t.error for t in group_of.trajectories} == {""}, (
                    "an error of the engine was handed over as data"
                )
            except EngineDead as error:
                errors.append(error)
    assert time.monotonic() - killed < 30
    assert errors, "no call was in flight when the engine died"

    deadline = time.monotonic() + 60
    while True:  # the restarted process answers, and has no engine yet
        assert time.monotonic() < deadline, "the actor did not come back"
        try:
            new_pid = ray.get(actor.apply.remote(lambda runner: __import__("os").getpid()), timeout=30)
        except ray.exceptions.RayActorError:
            time.sleep(0.5)
            continue
        if new_pid != pid:
            break
        time.sleep(0.2)
    assert not psutil.pid_exists(pid)
    with pytest.raises(RuntimeError, match=r"RolloutActor\(1\) was asked before start\(\) returned"):
        ray.get(actor.rollout_group.remote(lease_id="e", task=TASK, seed=0), timeout=30)
