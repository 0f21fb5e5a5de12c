"""One real vLLM engine that takes only adapters, against peft: logprobs, adapters that change in flight, their checksums.

The model has tied embeddings. The tests run in order, on one engine.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import peft
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from tiny_qwen3 import build_model, build_tokenizer

from actors.config import ADAPTER_RANKS, EngineConfig
from actors.engine import adapter
from actors.engine.protocol import Sampling
from actors.engine.vllm import VLLMEngine
from models.checksums import checksum
from models.weight_update import WeightUpdate
from trajectory.types import Segment

VOCAB_SIZE = len(build_tokenizer())
PROMPT = [int(i) for i in np.random.default_rng(0).integers(0, 256, 70)]
"""Two whole blocks of 32, and some."""

RANK, ALPHA = 4, 10


def adapted(seed: int, targets: Any = "all-linear") -> peft.PeftModel:
    shape = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build_model(VOCAB_SIZE, seed=0, tied=True), shape)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


PLAIN = build_model(VOCAB_SIZE, seed=0, tied=True)
FIRST = adapted(1)
SECOND = adapted(2, ["q_proj", "down_proj"])  # the other layers must lose what they had


def tensors_of(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """As learners publish them."""
    found = peft.get_peft_model_state_dict(model)
    return {name: tensor * (ALPHA / RANK if "lora_B" in name else 1) for name, tensor in found.items()}


def update_of(tensors: dict[str, torch.Tensor], policy_version: int) -> WeightUpdate:
    return WeightUpdate(
        policy_version=policy_version,
        backend="adapter",
        names=tuple(tensors),
        dtypes=("float32",) * len(tensors),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors.values()),
        payload={name: (tensor.numpy(), "float32") for name, tensor in tensors.items()},
    )


def reference(model: torch.nn.Module, token_ids: list[int]) -> NDArray[np.float32]:
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()


def sums_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(checksum(tensor, torch.float32)) for name, tensor in tensors.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VLLMEngine]:
    path = tmp_path_factory.mktemp("tied")
    PLAIN.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    settings = {"max_model_len": 1024, "cpu_kv_cache_gib": 1, "weight_transfer": "adapter", "adapter_rank": RANK}
    engine = VLLMEngine(EngineConfig(model=str(path), **settings))
    await engine.start()
    yield engine
    await engine.shutdown()


on_one_engine = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


class TestOneEngine:
    pytestmark = on_one_engine

    async def test_an_adapter_comes_in_flight(self, engine: VLLMEngine) -> None:
        """The first one, so that requests go on that began with none; nothing old is left in the prefix cache."""
        np.testing.assert_allclose(await engine.score(PROMPT), reference(PLAIN, PROMPT), atol=1e-4)
        prompts = [[*PROMPT[:30], i] for i in range(24)]
        requests = [
            asyncio.create_task(engine.generate(prompt, Sampling(max_tokens=300), f"flight-{i}"))
            for i, prompt in enumerate(prompts)
        ]
        assert (await engine.generate(PROMPT, Sampling(max_tokens=60), "cached")).num_cached_tokens == 64

        report = await engine.update_weights(update_of(tensors_of(FIRST), 1))
        assert engine.policy_version == report.policy_version == 1
        late = await engine.generate(PROMPT, Sampling(max_tokens=20), "late")
        sampled = await asyncio.gather(*requests)

        assert late.num_cached_tokens == 0
        assert late.segments == (Segment(start=0, end=len(late.token_ids), policy_version=1),)
        expected = reference(FIRST, [*PROMPT, *late.token_ids])[len(PROMPT) - 1 :]
        np.testing.assert_allclose(late.logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(await engine.score(PROMPT), reference(FIRST, PROMPT), atol=1e-4)
        assert np.abs(reference(FIRST, PROMPT) - reference(PLAIN, PROMPT)).max() > 1

        crossed = [(p, s) for p, s in zip(prompts, sampled, strict=True) if len(s.segments) == 2]
        assert len(crossed) == report.num_kept > 0
        first_after = []
        for prompt, generation in crossed:
            before, after = generation.segments
            assert (before.start, before.policy_version, after.policy_version) == (0, 0, 1)
            assert (before.end, after.end) == (after.start, len(generation.token_ids))
            by_old = reference(PLAIN, [*prompt, *generation.token_ids])[len(prompt) - 1 :]
            np.testing.assert_allclose(generation.logprobs[: before.end], by_old[: before.end], atol=1e-4)
            first_after.append(abs(generation.logprobs[after.start] - by_old[after.start]))
        assert np.median(first_after) > 0.1, "the boundary is exact: the first token after it isn't the old policy's"

    async def test_a_text_is_scored_beside_requests_that_sample(self, engine: VLLMEngine) -> None:
        """As at every weight sync. vLLM mixes up their rows where the output layer may have an adapter."""
        flight = [engine.generate([*PROMPT[:30], i], Sampling(max_tokens=60), f"beside-{i}") for i in range(3)]
        sampling = [asyncio.create_task(request) for request in flight]
        scored = [await engine.score(PROMPT) for _ in range(3)]
        for logprobs in scored:
            np.testing.assert_allclose(logprobs, reference(FIRST, PROMPT), atol=1e-4)
        await asyncio.gather(*sampling)

    async def test_the_engine_tells_what_it_holds(self, engine: VLLMEngine) -> None:
        published = sums_of(tensors_of(FIRST))
        held = await engine.held_sums([*published, "other"])
        assert held.sums == published
        assert list(held.unknown) == ["other"]

    async def test_another_adapter_takes_its_place_and_the_cache_of_the_old_one_is_not_used(
        self, engine: VLLMEngine
    ) -> None:
        assert (await engine.generate(PROMPT, Sampling(max_tokens=1), "old")).num_cached_tokens == 64
        await engine.update_weights(update_of(tensors_of(SECOND), 2))
        fresh = await engine.generate(PROMPT, Sampling(max_tokens=20), "fresh")
        assert fresh.num_cached_tokens == 0
        expected = reference(SECOND, [*PROMPT, *fresh.token_ids])[len(PROMPT) - 1 :]
        np.testing.assert_allclose(fresh.logprobs, expected, atol=1e-4)
        again = await engine.generate(PROMPT, Sampling(max_tokens=20, seed=1), "again")
        assert again.num_cached_tokens == 64
        expected = reference(SECOND, [*PROMPT, *again.token_ids])[len(PROMPT) - 1 :]
        np.testing.assert_allclose(again.logprobs, expected, atol=1e-4)
        assert (await engine.held_sums(list(tensors_of(SECOND)))).sums == sums_of(tensors_of(SECOND))

    async def test_adapters_that_do_not_fit_are_refused_and_change_nothing(self, engine: VLLMEngine) -> None:
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        a, b = torch.zeros(RANK, 64), torch.zeros(64, RANK)
        for tensors, message in (
            ({"lm_head.weight": a}, "other tensors than pairs"),
            ({f"{name}.lora_A.weight": torch.zeros(9, 64)}, r"rank 9, .* started for 4 \(engine.adapter_rank\)"),
            ({f"{name}.lora_A.weight": a}, "which aren't both of rank 4"),
            ({"base_model.model.lm_head.lora_A.weight": a}, "one of the output layer"),
            ({f"{name}.lora_A.weight": a[:, :32], f"{name}.lora_B.weight": b}, r"q_proj is \(64, 32\)"),
        ):
            with pytest.raises(ValueError, match=message):
                await engine.update_weights(update_of(tensors, 3))
        assert engine.policy_version == 2
        np.testing.assert_allclose(await engine.score(PROMPT), reference(SECOND, PROMPT), atol=1e-4)

    async def test_what_the_engine_samples_with_shows_in_its_sums(
        self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """vLLM drops a layer that it doesn't have, and scales by what the folder says, both without a word."""
        tensors = tensors_of(SECOND)
        elsewhere = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
        await engine.update_weights(update_of(elsewhere, 3))
        held = (await engine.held_sums(list(elsewhere))).sums
        assert {name for name, value in held.items() if value is None} == {n for n in elsewhere if ".7." in n}

        as_folder = adapter.as_folder

        @contextmanager
        def scaled_twice(update: WeightUpdate, tensors: Path) -> Iterator[Path]:
            with as_folder(update, tensors) as folder:
                description = json.loads((folder / "adapter_config.json").read_text())
                (folder / "adapter_config.json").write_text(json.dumps(description | {"lora_alpha": 2 * RANK}))
                yield folder

        monkeypatch.setattr(adapter, "as_folder", scaled_twice)
        await engine.update_weights(update_of(tensors, 4))
        published, held = sums_of(tensors), (await engine.held_sums(list(tensors))).sums
        assert {name for name in published if held[name] != published[name]} == {n for n in tensors if "lora_B" in n}


def test_the_ranks_are_those_of_vllm() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == ADAPTER_RANKS
    assert [adapter.smallest_rank(rank) for rank in (1, 4, 8, 9, 65, 512)] == [1, 8, 8, 16, 128, 512]
