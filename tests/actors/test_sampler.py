"""Groups on a scripted engine: siblings, seeds, the cap on episodes in flight, and failures as data."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tiny_qwen3 import build_tokenizer

from actors.config import EpisodeConfig
from actors.engine.protocol import EngineDead, Generation, Sampling, UpdateReport
from actors.sampler import Sampler
from models.weight_update import WeightUpdate
from trajectory.markup import validate
from trajectory.types import Segment, Task, ToolCall, ToolResult

TASKS = [Task(id=f"t{i}", question=f"{i}?", golds=(str(i),)) for i in range(3)]


class ScriptedEngine:
    """Each episode calls a tool once, then answers; episodes whose index is in `broken` lose their engine."""

    policy_version = 5
    cause_of_death = ""
    num_requests = 0

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken
        self.asked: list[tuple[str, Sampling]] = []
        self.busy = self.most_busy = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        self.asked.append((request_id, sampling))
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        await asyncio.sleep(0.001)
        self.busy -= 1
        _, index, turn = request_id.rsplit("/", 2)
        if int(index) in self.broken:
            raise EngineDead("the vLLM engine is dead: killed")
        text = "<code>1</code>" if turn == "0" else "<answer>1</answer>"
        segments = (Segment(start=0, end=1, policy_version=self.policy_version),)
        return Generation(
            token_ids=[7],
            logprobs=[-0.5],
            text=text,
            finish_reason="stop_string",
            segments=segments,
            num_cached_tokens=3,
        )

    async def start(self) -> None: ...

    async def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        raise NotImplementedError

    async def init_weight_transfer(self, init_info: dict[str, object]) -> None:
        raise NotImplementedError

    async def update_weights(self, update: WeightUpdate) -> UpdateReport:
        raise NotImplementedError

    async def shutdown(self) -> None: ...


async def call_tool(call: ToolCall, timeout_s: float) -> ToolResult:
    return ToolResult(status="ok", output=call.content)


def sampler_on(engine: ScriptedEngine, **config: object) -> Sampler:
    return Sampler(
        engine, build_tokenizer(), call_tool, EpisodeConfig(system_prompt="", **config), max_concurrent_episodes=4
    )


async def test_a_group_of_siblings() -> None:
    engine = ScriptedEngine()
    sampler = sampler_on(engine, temperature=0.7)
    group = await sampler.sample_group(TASKS[0], lease_id="l", group_size=3, seed=1)
    assert (group.lease_id, group.task, group.rewards, group.min_policy_version) == ("l", TASKS[0], (), 5)
    assert [t.index for t in group.trajectories] == [0, 1, 2]
    assert [t.finish_reason for t in group.trajectories] == ["answer"] * 3
    assert {s.temperature for _, s in engine.asked} == {0.7}
    assert len({s.seed for _, s in engine.asked}) == 6, "every turn of every sibling has its own seed"
    assert (sampler.num_generated_tokens, sampler.num_cached_tokens, sampler.num_episodes_finished) == (6, 18, 3)
    # ChatML around "0?", one byte a token: "<|im_start|>user\n0?<|im_end|>\n<|im_start|>assistant\n".
    assert len(group.trajectories[0].prompt_ids) == 1 + 5 + 2 + 1 + 1 + 1 + 10

    again = ScriptedEngine()
    await sampler_on(again).sample_group(TASKS[0], lease_id="l", group_size=3, seed=1)
    assert [s.seed for _, s in sorted(again.asked)] == [s.seed for _, s in sorted(engine.asked)]


async def test_a_failed_episode_leaves_its_siblings_alone() -> None:
    group = await sampler_on(ScriptedEngine(broken=(1,))).sample_group(TASKS[0], lease_id="l", group_size=3, seed=1)
    assert [t.finish_reason for t in group.trajectories] == ["answer", "error", "answer"]
    assert group.trajectories[1].error.startswith("EngineDead")


async def test_evaluation_keeps_the_order_and_the_cap() -> None:
    engine = ScriptedEngine()
    groups = await sampler_on(engine).evaluate(TASKS, num_samples=5, temperature=0.0, seed=3)
    assert [g.task for g in groups] == TASKS
    assert [len(g.trajectories) for g in groups] == [5, 5, 5]
    assert {s.temperature for _, s in engine.asked} == {0.0}
    assert engine.most_busy == 4
    assert len({s.seed for _, s in engine.asked}) == 3 * 5 * 2


async def test_an_attempt_on_a_prompt_of_the_callers_own() -> None:
    engine = ScriptedEngine()
    sampler = sampler_on(engine, max_prompt_tokens=3)
    trajectory = await sampler.attempt(TASKS[1], [1] * 50, "repair-0/t1", 5, 0.3)
    assert (trajectory.task_id, trajectory.finish_reason, trajectory.num_tool_calls) == ("t1", "answer", 1)
    assert trajectory.prompt_ids.tolist() == [1] * 50, "its length is the caller's affair"
    assert [name for name, _ in engine.asked] == ["0/repair-0/t1/0/0", "1/repair-0/t1/0/1"]
    assert {s.temperature for _, s in engine.asked} == {0.3}
    assert sampler.num_episodes_finished == 1


async def test_a_thought_that_the_prompt_opened_is_part_of_the_text_and_not_of_the_response() -> None:
    class Thinker(ScriptedEngine):
        async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
            said = await super().generate(prompt_ids, sampling, request_id)
            return replace(said, text="Run it.</think>" + said.text if request_id.endswith("/0") else said.text)

    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    config = EpisodeConfig(system_prompt="")
    sampler = Sampler(Thinker(), tokenizer, call_tool, config, max_concurrent_episodes=1)
    (trajectory,) = (await sampler.sample_group(TASKS[0], lease_id="l", group_size=1, seed=1)).trajectories
    assert trajectory.text.startswith("<think>\nRun it.</think><code>1</code>\n<result>")
    assert trajectory.opening == "<think>\n"
    assert trajectory.turns[0].text == "Run it.</think><code>1</code>"
    assert "unpaired_tag" not in validate(trajectory.text)
    assert tokenizer.decode(trajectory.prompt_ids).endswith("<think>\n")
    assert trajectory.response_ids.tolist()[0] == 7, "the response begins with what was sampled"
