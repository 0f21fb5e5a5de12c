"""An engine of one's own: it is named in the configuration, and the actors work with it as with vLLM."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from tiny_qwen3 import build_tokenizer

from actors.config import EngineConfig, EpisodeConfig, RepairConfig, RepairSettings, RolloutConfig, RolloutSettings
from actors.engine.protocol import EngineDead, Generation, Sampling, UpdateReport
from actors.engine.registry import ENGINES, make_engine
from actors.repair.actor import RepairActor
from actors.rollout import RolloutActor
from models.checksums import HeldSums
from models.weight_update import WeightUpdate
from trajectory.types import Segment, Task

TASK = Task(id="t", question="2+3?", golds=("5",))
REPLY = "<think>Add.</think><answer>\\boxed{5}</answer>"
NO_GATEWAY = "127.0.0.1:1"


class FixedEngine:
    """Samples the same tokens for whatever prompt; a token's logprob is minus the version of its weights."""

    def __init__(self, config: EngineConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.cause_of_death = ""
        self.policy_version = 0
        self.num_requests = 0
        self.joined: list[dict[str, object]] = []
        self.life: list[str] = []
        self._reply = build_tokenizer().encode(REPLY, add_special_tokens=False)

    async def start(self) -> None:
        self.life.append("start")

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        if self.cause_of_death:
            raise EngineDead(f"the fixed engine is dead: {self.cause_of_death}")
        length = len(self._reply)
        return Generation(
            token_ids=list(self._reply),
            logprobs=[-float(self.policy_version)] * length,
            text=REPLY,
            finish_reason="stop_string",
            segments=(Segment(start=0, end=length, policy_version=self.policy_version),),
        )

    async def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return np.full(len(token_ids) - 1, -self.policy_version, np.float32)

    async def held_sums(self, names: Sequence[str]) -> HeldSums:
        return HeldSums.none(names, "the fixed engine has no weights")

    async def init_weight_transfer(self, init_info: dict[str, object]) -> None:
        self.joined.append(init_info)

    async def update_weights(self, update: WeightUpdate) -> UpdateReport:
        self.policy_version = update.policy_version
        return UpdateReport(policy_version=update.policy_version, write_s=0.0, paused_s=0.0, num_kept=0)

    async def shutdown(self) -> None:
        self.life.append("shutdown")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FixedEngine]:
    """The engines that were made, of a kind that is added from outside."""
    engines: list[FixedEngine] = []

    def fixed(config: EngineConfig, seed: int) -> FixedEngine:
        engines.append(FixedEngine(config, seed))
        return engines[-1]

    monkeypatch.setitem(ENGINES, "fixed", fixed)
    return engines


def rollout_actor(model_path: Path) -> RolloutActor:
    config = AlgorithmConfig().debugging(seed=40)
    config.rollout_settings = RolloutSettings(
        engine=EngineConfig(kind="fixed", model=str(model_path), max_model_len=1024),
        episode=EpisodeConfig(system_prompt="", max_prompt_tokens=100, max_response_tokens=900),
        rollout=RolloutConfig(group_size=3),
        sandbox_address=NO_GATEWAY,
    )
    return RolloutActor(config=config, worker_index=2)


async def test_a_rollout_actor_works_with_it(model_path: Path, made: list[FixedEngine]) -> None:
    actor = rollout_actor(model_path)
    await actor.start()
    (engine,) = made
    assert (engine.config.kind, engine.seed, engine.life) == ("fixed", 42, ["start"])

    group = await actor.rollout_group("a", TASK, seed=1)
    assert [(t.text, t.finish_reason, t.error) for t in group.trajectories] == [(REPLY, "answer", "")] * 3
    assert group.min_policy_version == 0

    update: asyncio.Future[WeightUpdate] = asyncio.get_running_loop().create_future()
    update.set_result(WeightUpdate(policy_version=3, backend="host", names=(), dtypes=(), shapes=(), payload={}))
    assert (await actor.update_weights([update])).policy_version == 3
    (evaluated,) = await actor.evaluate([TASK], num_samples=2, temperature=0.0, seed=0)
    assert evaluated.min_policy_version == 3
    answer = await actor.answer_gate([1, 2, 3], ["lm_head.weight"])
    assert answer.logprobs.tolist() == [-3.0, -3.0]
    assert answer.held.unknown == {"lm_head.weight": "the fixed engine has no weights"}
    await actor.init_weight_transfer({"rank_offset": 1})
    assert engine.joined == [{"rank_offset": 1}]
    stats = await actor.stats()
    assert (stats["policy_version"], stats["requests_in_flight"], stats["episodes_finished"]) == (3, 0, 5)

    await actor.shutdown()  # from here on a dead engine no longer ends the process
    engine.cause_of_death = "as asked"
    with pytest.raises(EngineDead, match="the engine is dead: as asked"):
        await actor.rollout_group("b", TASK, seed=1)
    assert engine.life == ["start", "shutdown"]


async def test_a_repair_actor_works_with_it(model_path: Path, made: list[FixedEngine]) -> None:
    engine = EngineConfig(kind="fixed", model=str(model_path), max_model_len=4096)
    actor = RepairActor(
        RepairSettings(
            model=str(model_path),
            repair=RepairConfig(repairer="engine", engine=engine),
            episode=EpisodeConfig(system_prompt=""),
            sandbox_address=NO_GATEWAY,
        ),
        index=5,
    )
    await actor.start()
    assert [(one.seed, one.life) for one in made] == [(5, ["start"])]
    assert (await actor.stats())["requests_in_flight"] == 0
    await actor.shutdown()
    assert made[0].life == ["start", "shutdown"]


def test_a_kind_that_nobody_added_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.kind = 'fixed' is no known engine; these are: vllm"):
        make_engine(EngineConfig(kind="fixed", model="m"), seed=0)
