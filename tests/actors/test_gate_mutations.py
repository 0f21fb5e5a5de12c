"""Faults of a weight sync that the gate must see, on one real engine in bfloat16, and its rounding, which must pass.

The published weights, their checksums and the learner's logprobs are right. What the engine is given is not. No fault but
the exchanged layers moves any token by as much as 0.3 nats, which rounding may do, too."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from tiny_qwen3 import build_model, build_tokenizer
from torch import Tensor

from actors.config import EngineConfig
from actors.engine.protocol import GateAnswer
from actors.engine.vllm import VLLMEngine
from autotraj.errors import GateError
from autotraj.runners.gate import Gate
from models.checksums import Checksums, checksum
from models.weight_update import LogprobProbe, WeightUpdate

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

State = Mapping[str, Tensor]

MODEL = build_model(len(build_tokenizer()), seed=0).to(torch.bfloat16)
PROBE = tuple(int(i) for i in np.random.default_rng(0).integers(0, 256, 110))
ADAPTED = ("q_proj", "o_proj", "down_proj")
CHANGE = 1.5e-3
"""Standard deviation of a change of weights, which themselves have 0.2: that of many steps."""


def stepped(state: State, seed: int) -> dict[str, Tensor]:
    """The weights after training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + CHANGE * torch.randn(tensor.shape, generator=generator)).to(torch.bfloat16)
        if tensor.dim() == 2
        else tensor
        for name, tensor in state.items()
    }


def adapted(state: State, scale: float) -> dict[str, Tensor]:
    """The weights with adapters merged."""
    generator = torch.Generator().manual_seed(9)
    merged = dict(state)
    for name, tensor in state.items():
        if any(target in name for target in ADAPTED):
            b, a = (torch.randn(size, generator=generator) for size in ((tensor.shape[0], 4), (4, tensor.shape[1])))
            merged[name] = (tensor.float() + scale * CHANGE / 4 * (b @ a)).to(torch.bfloat16)
    return merged


OLD = {name: tensor.detach().clone() for name, tensor in MODEL.state_dict().items()}
NEW = stepped(OLD, 1)


def exchanged(state: State) -> dict[str, Tensor]:
    def other(name: str) -> str:
        return name.translate(str.maketrans("01", "10"))  # the only digits in names are the layers' numbers

    return {name: state[other(name)] for name in state}


def one_bit(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(torch.int16)[3, 5] += 1
    return changed


def update_of(state: State, version: int) -> WeightUpdate:
    return WeightUpdate(
        policy_version=version,
        backend="host",
        names=tuple(state),
        dtypes=("bfloat16",) * len(state),
        shapes=tuple(tuple(tensor.shape) for tensor in state.values()),
        payload={name: (tensor.view(torch.uint16).numpy(), "bfloat16") for name, tensor in state.items()},
    )


def reference(state: State, version: int) -> tuple[LogprobProbe, Checksums]:
    """The learner's word on the weights: a bfloat16 forward pass by transformers, and checksums."""
    MODEL.load_state_dict(state)
    ids = torch.tensor([PROBE])
    with torch.no_grad():
        logprobs = torch.log_softmax(MODEL(ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
    sums = {name: int(checksum(tensor, torch.bfloat16)) for name, tensor in state.items()}
    return (
        LogprobProbe(policy_version=version, token_ids=PROBE, logprobs=logprobs.numpy()),
        Checksums(policy_version=version, dtype="bfloat16", sums=sums),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VLLMEngine]:
    path: Path = tmp_path_factory.mktemp("tiny-bf16")
    build_tokenizer().save_pretrained(path)
    MODEL.save_pretrained(path)
    engine = VLLMEngine(EngineConfig(model=str(path), dtype="bfloat16", max_model_len=256, cpu_kv_cache_gib=1))
    await engine.start()
    yield engine
    await engine.shutdown()


async def synced(engine: VLLMEngine, gate: Gate, published: State, version: int, given: State | None = None) -> None:
    """One sync and its gate. `given` is what the engine gets instead."""
    gate.begin(*reference(published, version))
    await engine.update_weights(update_of(published if given is None else given, version))
    logprobs, held = await asyncio.gather(engine.score(gate.probe.token_ids), engine.held_sums(gate.names))
    gate.check(GateAnswer(logprobs=logprobs, held=held, sums_s=0.0), who="rollout actor 1")
    assert not held.unknown


async def test_rounding_passes_and_every_tensor_is_compared(engine: VLLMEngine) -> None:
    gate = Gate("bfloat16")
    state: State = OLD
    found = []
    for version in range(4):
        await synced(engine, gate, state, version)
        found.append((gate.metrics["sync/logprob_diff_mean"], gate.metrics["sync/logprob_diff_max"]))
        assert gate.metrics["sync/tensors_unchecked"] == 0
        state = stepped(state, version)
    print(found)
    assert all(0.003 < mean < 0.1 for mean, _ in found)  # real rounding, far above that of float32


K = "model.layers.1.self_attn.k_proj.weight"
FAULTS: dict[str, tuple[State, State, str]] = {
    "dropped update": (NEW, OLD, "so the update did not reach them"),
    "stale tensor": (NEW, NEW | {K: OLD[K]}, rf"1 of 25 tensors differ: {K} \(it holds {K} of version 0\)"),
    "exchanged layers": (
        NEW,
        exchanged(NEW),
        r"layers\.0\.self_attn\.q_proj\.weight \(it holds model\.layers\.1\.self_attn\.q_proj\.weight of version 1\)",
    ),
    "wrong scale of adapters": (adapted(OLD, 1.0), adapted(OLD, 2.0), "6 of 25 tensors differ"),
    "one entry by one bit": (NEW, NEW | {K: one_bit(NEW[K])}, rf"1 of 25 tensors differ: {K}\. "),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_seen(engine: VLLMEngine, fault: str) -> None:
    published, given, says = FAULTS[fault]
    gate = Gate("bfloat16")
    await synced(engine, gate, OLD, 0)
    with pytest.raises(GateError, match=says):
        await synced(engine, gate, published, 1, given)
    largest = np.abs(gate.probe.logprobs - await engine.score(PROBE)).max()
    print(fault, largest)
    assert (largest < 0.3) == (fault != "exchanged layers")
