"""Repair with the real parts: the tiny base on a real engine, tools in real containers, actors in a real Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import ray
from chat_server import chat_server
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from repair_cases import ANSWER, CALL, GOOD, RAMBLING, make_request

from actors.config import EndpointConfig, EngineConfig, EpisodeConfig, RepairConfig, RepairSettings, RolloutSettings
from actors.engine.protocol import EngineDead
from actors.repair.actor import RepairActor
from actors.repair.types import Reason, RepairResult
from actors.rollout import RolloutActor
from tool_sandbox.local import local_sandbox
from trajectory.chat import load_tokenizer

pytestmark = [pytest.mark.docker, pytest.mark.ray]

BASE = str(Path(__file__).parents[2] / "examples" / "tiny" / "base")
EPISODE = EpisodeConfig(system_prompt="", max_prompt_tokens=160, max_response_tokens=160, max_result_chars=200)
# The tiny base was not taught this prompt: it shows that a repair's tools run, not that it repairs.
REPAIR = RepairConfig(
    right_prompt="{question}\n{trajectory}", wrong_prompt="{question}\n{trajectory}", temperatures=(0.5, 1.0)
)


@pytest.fixture(scope="module")
def gateway() -> Iterator[str]:
    with local_sandbox(num_containers=1) as gateway:
        yield gateway.address


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 1024**2, log_to_driver=False
    )
    yield
    ray.shutdown()


@pytest.mark.engine
def test_the_policys_engine_repairs(gateway: str, ray_here: None) -> None:
    config = AlgorithmConfig()
    config.rollout_settings = RolloutSettings(
        engine=EngineConfig(model=BASE, max_model_len=512, cpu_kv_cache_gib=1),
        episode=EPISODE,
        repair=REPAIR,
        sandbox_address=gateway,
    )
    config.env_runners(env_runner_cls=RolloutActor, num_env_runners=1, create_local_env_runner=False)
    group = EnvRunnerGroup(config=config, local_env_runner=False)
    actor = group._worker_manager.actors()[1]
    ray.get(actor.start.remote(), timeout=240)
    requests = [make_request(GOOD if i % 2 else RAMBLING, correct=True) for i in range(12)]
    requests.append(make_request("<think>x</think>" * 200))
    results: list[RepairResult] = ray.get(actor.repair.remote(requests=requests, seed=1), timeout=120)

    assert len(results) == 13
    for request, result in zip(requests, results, strict=True):
        assert 1 <= len(result.attempts) <= 2
        assert {attempt.reason for attempt in result.attempts} <= {"", *get_args(Reason)}
        assert [a.temperature for a in result.attempts] == [0.5, 1.0][: len(result.attempts)]
        if result.accepted is not None:
            assert result.accepted.prompt_ids.tolist() == request.trajectory.prompt_ids.tolist()
            assert not result.accepted.logprobs.any()
    assert [attempt.reason for attempt in results[12].attempts] == ["prompt_too_long"]
    written = [attempt.text for result in results for attempt in result.attempts]
    assert len({*written}) > 6, "each attempt has a seed of its own"
    assert any("</code>\n<result>\n" in text for text in written), "tools ran"
    stats = ray.get(actor.stats.remote(), timeout=30)
    assert (stats["episodes_in_flight"], stats["requests_in_flight"]) == (0, 0)
    ray.kill(actor)


def test_an_actor_before_an_endpoint(gateway: str, ray_here: None) -> None:
    with chat_server(CALL.removesuffix("</code>"), ANSWER.removesuffix("</answer>"), "<think>never") as server:
        settings = RepairSettings(
            model=BASE,
            repair=REPAIR.model_copy(
                update={"repairer": "endpoint", "endpoint": EndpointConfig(base_url=server.url, model="big")}
            ),
            episode=EPISODE,
            sandbox_address=gateway,
        )
        actor = ray.remote(RepairActor).options(num_cpus=1, max_restarts=-1, max_concurrency=100).remote(settings)
        with pytest.raises(ray.exceptions.RayTaskError, match=r"RepairActor\(0\) was asked before start\(\) returned"):
            ray.get(actor.repair.remote([], 0), timeout=60)
        ray.get([actor.start.remote(), actor.start.remote()], timeout=60)
        (good,) = ray.get(actor.repair.remote(requests=[make_request()], seed=0), timeout=60)
        assert good.accepted is not None
        assert good.accepted.text == GOOD, "the sandbox multiplied"
        tokenizer = load_tokenizer(BASE)
        assert tokenizer.decode(good.accepted.response_ids.tolist()) == GOOD
        (bad,) = ray.get(actor.repair.remote(requests=[make_request()], seed=0), timeout=60)
        assert [attempt.reason for attempt in bad.attempts] == ["unclosed_tag"] * 2

        # As RLlib's manager asks.
        manager = FaultTolerantActorManager([actor])
        stats = manager.foreach_actor(lambda one: one.stats(), timeout_seconds=30)
        (counts,) = [result.get() for result in stats]
        assert counts == {
            "requests": 2.0,
            "accepted": 1.0,
            "attempts": 3.0,
            "failed/unclosed_tag": 2.0,
            "requests_in_flight": 0,
            "generated_tokens": 28,
        }
        ray.get(actor.shutdown.remote(), timeout=30)
        ray.kill(actor)


@pytest.mark.engine
async def test_an_engine_of_its_own(gateway: str, model_path: Path) -> None:
    """Another model with another tokenizer; the class itself, without Ray."""
    engine = EngineConfig(model=str(model_path), max_model_len=1024, cpu_kv_cache_gib=1)
    config = REPAIR.model_copy(update={"repairer": "engine", "engine": engine})
    actor = RepairActor(RepairSettings(model=BASE, repair=config, episode=EPISODE, sandbox_address=gateway), 3)
    assert repr(actor) == "RepairActor(3)"
    try:
        await actor.start()
        results = await actor.repair([make_request("<think>a</think>", correct=True)] * 3, seed=2)
        for result in results:
            assert result.accepted is None, "random weights repair nothing"
            assert len(result.attempts) == 2
        assert (await actor.stats())["attempts"] == 6
    finally:
        await actor.shutdown()
    with pytest.raises(EngineDead, match="it was shut down"):
        await actor.repair([make_request()], seed=2)
