"""One real vLLM engine against Hugging Face: logprobs, stop strings, and weights that change in flight.

The tests run in order on one engine, as it takes half a minute to start; the last one leaves it dead.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny_qwen3 import build_model, build_tokenizer
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.config import EngineConfig
from actors.engine import host_weights
from actors.engine.checkpoint import check_backend, check_update
from actors.engine.protocol import EngineDead, Generation, Sampling
from actors.engine.vllm import VLLMEngine
from models.on_disk import tensor_shapes
from models.weight_update import WeightUpdate
from trajectory.types import Segment

VOCAB_SIZE = len(build_tokenizer())
OLD = build_model(VOCAB_SIZE, seed=0)
NEW = build_model(VOCAB_SIZE, seed=1)
PROMPT = [int(i) for i in np.random.default_rng(0).integers(0, 256, 70)]
"""Two whole blocks of 32, and some."""


def reference(model: torch.nn.Module, token_ids: Sequence[int], temperature: float = 1.0) -> NDArray[np.float32]:
    """log p(token_ids[i + 1] | token_ids[: i + 1]) by transformers, (len − 1,)."""
    ids = torch.tensor([list(token_ids)])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1] / temperature, dim=-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()


def sampled_reference(model: Qwen3ForCausalLM, prompt: Sequence[int], sampled: Generation, temperature: float = 1.0):
    return reference(model, [*prompt, *sampled.token_ids], temperature)[len(prompt) - 1 :]


def update_of(model: Qwen3ForCausalLM | Mapping[str, torch.Tensor], policy_version: int) -> WeightUpdate:
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    return WeightUpdate(
        policy_version=policy_version,
        backend="host",
        names=tuple(state),
        dtypes=("float32",) * len(state),
        shapes=tuple(tuple(tensor.shape) for tensor in state.values()),
        payload={name: (tensor.numpy(), "float32") for name, tensor in state.items()},
    )


def core_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VLLMEngine]:
    compiled = tmp_path_factory.mktemp("compiled")
    engine = VLLMEngine(EngineConfig(model=str(model_path), max_model_len=1024, cpu_kv_cache_gib=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        await engine.start()
    yield engine
    await engine.shutdown()
    _, left = psutil.wait_procs(core_processes(), timeout=15)
    assert left == []
    assert list(compiled.iterdir()) == []  # an eager engine compiles nothing


on_one_engine = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


class TestOneEngine:
    pytestmark = on_one_engine

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    async def test_sampled_logprobs_equal_transformers(self, engine: VLLMEngine, temperature: float) -> None:
        for seed in range(4):
            sampling = Sampling(max_tokens=40, temperature=temperature, seed=seed)
            sampled = await engine.generate(PROMPT[:20], sampling, f"logprobs-{temperature}-{seed}")
            expected = sampled_reference(OLD, PROMPT[:20], sampled, temperature)
            np.testing.assert_allclose(sampled.logprobs, expected, atol=1e-4)
            assert sampled.segments == (Segment(start=0, end=len(sampled.token_ids), policy_version=0),)

    async def test_a_seed_repeats_whatever_else_is_sampled(self, engine: VLLMEngine) -> None:
        alone = await engine.generate(PROMPT, Sampling(max_tokens=30, seed=7), "alone")
        busy = asyncio.gather(*(engine.generate(PROMPT, Sampling(max_tokens=30), f"busy-{i}") for i in range(40)))
        among = await engine.generate(PROMPT, Sampling(max_tokens=30, seed=7), "among")
        others = await busy
        assert among.token_ids == alone.token_ids
        assert len({tuple(other.token_ids) for other in others}) == 40

    async def test_the_earlier_group_is_released_before_another_is_joined(
        self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        real = engine._llm.collective_rpc

        async def noted(method: str, *args: Any, **kwargs: Any) -> Any:
            asked.append(method)
            return await real(method, *args, **kwargs)

        monkeypatch.setattr(engine._llm, "collective_rpc", noted)
        await engine.init_weight_transfer({})  # of a host engine, whose workers agree on nothing
        assert asked == ["shutdown_weight_transfer_engine", "init_weight_transfer_engine"]

    async def test_a_stop_string_cuts_the_text_and_leaves_the_tokens(self, engine: VLLMEngine) -> None:
        """`</co` ends inside the token `</code>`."""
        tokenizer = build_tokenizer()
        code = tokenizer.convert_tokens_to_ids("</code>")
        sampling = [Sampling(max_tokens=300, stop=("</co",), seed=seed) for seed in range(32)]
        sampled = await asyncio.gather(*(engine.generate(PROMPT, s, f"stop-{s.seed}") for s in sampling))
        stopped = [s for s in sampled if s.finish_reason == "stop_string"]
        assert stopped
        for generation in stopped:
            assert generation.text.endswith("</co")
            assert generation.token_ids[-1] == code
            assert len(generation.logprobs) == len(generation.token_ids)
        ended = [s for s in sampled if s.finish_reason == "eos"]
        assert ended
        assert all(s.token_ids[-1] == tokenizer.eos_token_id and "<|im_end|>" not in s.text for s in ended)
        assert all(len(s.token_ids) == 300 for s in sampled if s.finish_reason == "length")

    async def test_scores_equal_transformers_and_ignore_the_prefix_cache(self, engine: VLLMEngine) -> None:
        await engine.generate(PROMPT, Sampling(max_tokens=1), "fill the cache")
        for _ in range(2):
            np.testing.assert_allclose(await engine.score(PROMPT), reference(OLD, PROMPT), atol=1e-4)
        assert (await engine.score([5])).shape == (0,)

    async def test_a_cancelled_request_is_freed(self, engine: VLLMEngine) -> None:
        request = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=900), "cancelled"))
        for _ in range(30_000):
            if engine.num_requests:
                break
            await asyncio.sleep(0.001)
        assert engine.num_requests == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert engine.num_requests == 0
        assert engine._llm.get_num_unfinished_requests() == 0

    async def test_weights_of_another_model_are_refused_and_change_nothing(self, engine: VLLMEngine) -> None:
        other = update_of(build_model(VOCAB_SIZE + 1, seed=0), 1)
        with pytest.raises(ValueError, match=r"new weights of shape \(262, 64\)"):
            await engine.update_weights(other)
        np.testing.assert_allclose(await engine.score(PROMPT), reference(OLD, PROMPT), atol=1e-4)
        assert engine.policy_version == 0

    async def test_new_weights_in_flight(self, engine: VLLMEngine) -> None:
        """Requests go on, every token is stamped by the policy that sampled it, and nothing old is left in the cache."""
        prompts = [[*PROMPT[:30], i] for i in range(24)]
        requests = [
            asyncio.create_task(engine.generate(prompt, Sampling(max_tokens=300), f"flight-{i}"))
            for i, prompt in enumerate(prompts)
        ]
        cached = await engine.generate(PROMPT, Sampling(max_tokens=60), "cached")
        assert cached.num_cached_tokens == 64

        report = await engine.update_weights(update_of(NEW, 1))
        assert engine.policy_version == report.policy_version == 1
        late = await engine.generate(PROMPT, Sampling(max_tokens=20), "late")
        sampled = await asyncio.gather(*requests)

        assert late.num_cached_tokens == 0
        assert late.segments == (Segment(start=0, end=len(late.token_ids), policy_version=1),)
        np.testing.assert_allclose(late.logprobs, sampled_reference(NEW, PROMPT, late), atol=1e-4)
        np.testing.assert_allclose(await engine.score(PROMPT), reference(NEW, PROMPT), atol=1e-4)

        crossed = [(p, s) for p, s in zip(prompts, sampled, strict=True) if len(s.segments) == 2]
        assert len(crossed) == report.num_kept > 0
        for prompt, generation in crossed:
            before, after = generation.segments
            assert (before.start, before.policy_version, after.policy_version) == (0, 0, 1)
            assert before.end == after.start
            assert after.end == len(generation.token_ids)
            by_old = sampled_reference(OLD, prompt, generation)
            np.testing.assert_allclose(generation.logprobs[: before.end], by_old[: before.end], atol=1e-4)
        # The boundary is exact: the first token after it isn't the old policy's.
        first_after = [
            abs(s.logprobs[s.segments[1].start] - sampled_reference(OLD, p, s)[s.segments[1].start]) for p, s in crossed
        ]
        assert np.median(first_after) > 0.1

    async def test_a_failed_update_ends_the_engine_and_all_requests_at_once(
        self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"not tensors")
        shared = host_weights.SharedWeights(broken, broken.open("rb"))
        monkeypatch.setattr(host_weights, "share", lambda publication, payload, timeout_s: shared)
        requests = [
            asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=900), f"doomed-{i}")) for i in range(8)
        ]
        await asyncio.sleep(0.05)
        with pytest.raises(Exception, match="load new weights"):
            await engine.update_weights(update_of(OLD, 2))
        started = time.monotonic()
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert time.monotonic() - started < 5.0
        dead = [o for o in outcomes if isinstance(o, EngineDead)]
        assert dead
        assert "update to policy version 2 failed" in str(dead[0])
        assert all(isinstance(o, EngineDead | Generation) for o in outcomes)
        with pytest.raises(EngineDead, match="policy version 2"):
            await engine.generate(PROMPT, Sampling(max_tokens=1), "after")
        assert not broken.exists()


@pytest.mark.engine
async def test_a_mixture_of_experts_takes_new_weights_again_and_again(tmp_path: Path) -> None:
    """In the form of its checkpoint, which has a tensor for each expert where transformers' modules have one a layer, and
    one for the embeddings of input and output, which are tied."""
    shape = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 64)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2, "tie_word_embeddings": True}
    mixture = Qwen3MoeConfig(vocab_size=VOCAB_SIZE, eos_token_id=257, bos_token_id=None, **shape, **heads, **experts)
    mixtures, held = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        mixtures.append(Qwen3MoeForCausalLM(mixture).eval())
        mixtures[-1].save_pretrained(tmp_path / str(seed))
        held.append(load_file(tmp_path / str(seed) / "model.safetensors"))
    build_tokenizer().save_pretrained(tmp_path / "0")
    engine = VLLMEngine(EngineConfig(model=str(tmp_path / "0"), max_model_len=256, cpu_kv_cache_gib=1))
    try:
        await engine.start()
        np.testing.assert_allclose(await engine.score(PROMPT), reference(mixtures[0], PROMPT), atol=1e-4)
        for version, which in enumerate((1, 0, 1), start=1):
            await engine.update_weights(update_of(held[which], version))
            np.testing.assert_allclose(await engine.score(PROMPT), reference(mixtures[which], PROMPT), atol=1e-4)
    finally:
        await engine.shutdown()


async def test_asked_before_it_started() -> None:
    with pytest.raises(EngineDead, match="was not started"):
        await VLLMEngine(EngineConfig(model="nowhere")).generate([1], Sampling(max_tokens=1), "early")


@pytest.mark.engine
@pytest.mark.asyncio
async def test_a_request_that_waits_across_new_weights_does_not_pass_for_one_of_the_new_policy(
    model_path: Path,
) -> None:
    """It finds the prompt's keys and values in the cache, where the old policy left them."""
    settings = {"max_model_len": 1024, "cpu_kv_cache_gib": 1, "max_num_seqs": 1}
    engine = VLLMEngine(EngineConfig(model=str(model_path), **settings))
    await engine.start()
    try:
        await engine.generate(PROMPT, Sampling(max_tokens=1), "fills the cache")
        first = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=400), "first"))
        waits = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=20), "waits"))
        await asyncio.sleep(0)  # both begin before the update does
        assert engine.num_requests == 2
        await engine.update_weights(update_of(NEW, 1))
        await first
        waited = await waits
        assert waited.num_cached_tokens == 64
        assert waited.segments == (
            Segment(start=0, end=0, policy_version=0),
            Segment(start=0, end=20, policy_version=1),
        )
        differences = np.abs(np.asarray(waited.logprobs) - sampled_reference(NEW, PROMPT, waited))
        assert differences.max() > 1e-3, "the reason for which it may not be compared with the new policy"
    finally:
        await engine.shutdown()


def test_updates_are_checked_against_the_checkpoint(model_path: Path) -> None:
    expected = tensor_shapes(str(model_path))
    assert expected["lm_head.weight"] == (VOCAB_SIZE, 64)
    check_update(update_of(NEW, 1), expected)
    check_backend(update_of(NEW, 1), "host")
    with pytest.raises(ValueError, match="takes weights by 'nccl'"):
        check_backend(update_of(NEW, 1), "nccl")
    with pytest.raises(ValueError, match=r"missing \['bias'\], unknown \[\]"):
        check_update(update_of(NEW, 1), expected | {"bias": (1,)})


OWNER = """
import asyncio, sys
from actors.config import EngineConfig
from actors.engine.vllm import VLLMEngine

async def own():
    config = EngineConfig(model=sys.argv[1], max_model_len=1024, cpu_kv_cache_gib=1)
    # Copied, as our configuration has no two workers on a CPU. vLLM has.
    engine = VLLMEngine(config.model_copy(update={"tensor_parallel_size": 2}))
    await engine.start()
    print("up", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(own())
"""


@pytest.mark.engine
def test_no_process_of_an_engine_of_two_workers_outlives_its_killed_owner(model_path: Path) -> None:
    """On a GPU each would keep its card. A raylet ends what a dead actor started; here is none, as if it had died, too."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(model_path)], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    )
    processes: list[psutil.Process] = []
    try:
        assert owner.stdout is not None
        assert "up\n" in owner.stdout, "it ended before the engine was up"
        processes = psutil.Process(owner.pid).children(recursive=True)
        titles = sorted(title for p in processes if (title := p.cmdline()[0]).startswith("VLLM"))
        assert titles == ["VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1"]
        owner.kill()
        _, left = psutil.wait_procs(processes, timeout=30)
        assert left == []
    finally:
        for process in [owner, *processes]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        owner.wait()
        owner.stdout.close()
