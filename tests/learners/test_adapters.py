"""Adapters in training against `peft` itself in plain torch; what leaves the learner is a plain model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_reference import plain_logprobs, plain_scores, token_logprobs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from learners import adapters
from learners.batching import Pair, Sample
from learners.config import LearnerConfig, LoraConfig, LossConfig
from learners.engine import DeepSpeedEngine
from learners.published_sums import PublishedSums
from learners.weight_sync import HostMemory, adapter_update, host_update, nccl_update
from models.checksums import checksum

pytestmark = [pytest.mark.usefixtures("single_rank"), pytest.mark.slow]

LORA = LoraConfig(rank=4, alpha=16)


def config(model: Path, **settings: Any) -> LearnerConfig:
    defaults = {"lr": 1e-2, "eps": 1e-3, "micro_batch_tokens": 200, "lora": LORA}
    return LearnerConfig(model=str(model), **(defaults | settings))


def weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.full_weights()}


def plain_sft(model: Path, samples: list[Sample], settings: LearnerConfig, num_steps: int) -> dict[str, torch.Tensor]:
    """Peft's own wrapper and merge, with the adapters' values that the learner would draw."""
    import peft

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    shape = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    drawn = dict(DeepSpeedEngine(settings)._module.lm.named_parameters())
    wrapped = peft.get_peft_model(lm, shape)
    wrapped.load_state_dict({f"base_model.model.{name}": p for name, p in drawn.items()})
    optimizer = torch.optim.AdamW(
        [p for p in wrapped.parameters() if p.requires_grad], lr=settings.lr, eps=settings.eps, weight_decay=0.0
    )
    num_tokens = sum(s.num_loss_tokens for s in samples)
    for _ in range(num_steps):
        for sample in samples:
            logprobs = token_logprobs(wrapped, sample.ids)[sample.prompt_len - 1 :]
            (-logprobs[torch.from_numpy(sample.mask)].sum() / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return dict(wrapped.merge_and_unload().state_dict())


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_training_equals_peft_and_leaves_as_a_plain_model(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, zero_stage: int
) -> None:
    settings = config(tiny_model, zero_stage=zero_stage)
    expected = plain_sft(tiny_model, samples, config(tiny_model, zero_stage=0), num_steps=3)
    engine = DeepSpeedEngine(settings)
    untrained = weights(engine)
    assert untrained.keys() == expected.keys(), "plain Hugging Face names"
    for _ in range(3):
        metrics = engine.sft_step(samples)
        host_update(engine, HostMemory())  # reading merged weights between steps must not disturb them
    assert metrics["num_tokens"] == sum(s.num_loss_tokens for s in samples)
    after = weights(engine)
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    changed = {name for name in after if not torch.equal(after[name], untrained[name])}
    assert changed == {name for name in after if "_proj" in name}
    assert all(not p.requires_grad or "lora_" in n for n, p in engine._module.lm.named_parameters())

    # Engine and learner are the same function: what is published scores as the adapters do.
    engine.export_hf(tmp_path / "exported")
    ours = engine.logprobs(samples[1].ids)
    np.testing.assert_allclose(plain_logprobs(tmp_path / "exported", samples[1].ids), ours, atol=1e-5)
    update, declared = host_update(engine, HostMemory()), nccl_update(engine)
    assert update is not None
    assert (update.names, update.shapes, update.dtypes) == (declared.names, declared.shapes, declared.dtypes)
    for name in after:
        np.testing.assert_array_equal(update.payload[name][0], after[name].numpy())


def test_reading_between_steps_changes_no_bit(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    results = []
    for read in (False, True):
        engine = DeepSpeedEngine(config(tiny_model, zero_stage=3))
        for _ in range(3):
            engine.policy_step(samples)
            if read:
                weights(engine)
                engine.export_hf(tmp_path / "exported")
                engine.logprobs(samples[0].ids)
        results.append(weights(engine))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_policy_with_kl_to_the_model_without_adapters(tiny_model: Path, samples: list[Sample], zero_stage: int) -> None:
    loss = LossConfig(kl_estimator="k3", kl_coef=0.1)
    engine = DeepSpeedEngine(config(tiny_model, zero_stage=zero_stage), loss)
    assert engine._reference is engine._deepspeed, "no second copy of the weights"
    kls = [engine.policy_step(samples)["kl_ref"] for _ in range(3)]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert kls[0] < kls[1] < kls[2]
    with_adapters = engine.logprobs(samples[0].ids)
    with adapters.switched_off(engine._module.lm):
        without = engine.logprobs(samples[0].ids)
    np.testing.assert_allclose(without, plain_logprobs(tiny_model, samples[0].ids), atol=1e-5)
    assert np.abs(with_adapters - without).max() > 1e-3


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_checkpoint_holds_only_the_adapters_and_continues_exactly(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, zero_stage: int
) -> None:
    settings = config(tiny_model, zero_stage=zero_stage)
    engine = DeepSpeedEngine(settings)
    engine.policy_step(samples)
    engine.save(tmp_path / "checkpoint")
    engine.policy_step(samples)
    expected = weights(engine)
    resumed = DeepSpeedEngine(settings.model_copy(update={"seed": 5}))
    resumed.load(tmp_path / "checkpoint")
    resumed.policy_step(samples)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    size = sum(f.stat().st_size for f in (tmp_path / "checkpoint").rglob("*.pt"))
    assert size < 4 * sum(t.numel() for t in expected.values()), "less than the weights alone, in float32"
    with pytest.raises(ValueError, match="holds adapters and this learner trains all weights"):
        DeepSpeedEngine(config(tiny_model, zero_stage=zero_stage, lora=None)).load(tmp_path / "checkpoint")


def test_dropout_is_for_supervised_steps_and_never_for_reading(tiny_model: Path, samples: list[Sample]) -> None:
    lora = LORA.model_copy(update={"dropout": 0.5})
    losses = {}
    for settings in (LORA, lora):
        engine = DeepSpeedEngine(config(tiny_model, lora=settings))
        losses[settings.dropout] = [engine.sft_step(samples)["loss"] for _ in range(3)]
    assert losses[0.0][0] == pytest.approx(losses[0.5][0], abs=1e-6)  # adapters are still nothing
    assert abs(losses[0.0][2] - losses[0.5][2]) > 1e-4
    np.testing.assert_array_equal(engine.logprobs(samples[0].ids), engine.logprobs(samples[0].ids))
    with pytest.raises(ValueError, match=r"lora.dropout=0.5: engines sample without dropout"):
        engine.policy_step(samples)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_reward_model_trains_adapters_and_head(
    tiny_model: Path, pairs: list[Pair], tmp_path: Path, zero_stage: int
) -> None:
    engine = DeepSpeedEngine(config(tiny_model, head="scalar", zero_stage=zero_stage))
    before = weights(engine)
    losses = [engine.pair_step(pairs)["loss"] for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, tensor in weights(engine).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "_proj" in name or name == "score.weight"}
    engine.export_hf(tmp_path / "exported")
    sequences = [pair.chosen for pair in pairs]
    np.testing.assert_allclose(plain_scores(tmp_path / "exported", sequences), engine.scores(sequences), atol=1e-5)
    assert not any("lora" in n or "base_layer" in n for n in before)


def test_gradient_checkpointing_recomputes_and_changes_nothing(tiny_model: Path, samples: list[Sample]) -> None:
    results, passes = [], []
    for recompute in (False, True):
        engine = DeepSpeedEngine(config(tiny_model, zero_stage=3, gradient_checkpointing=recompute))
        calls = [0]

        def count(*_: Any, calls: list[int] = calls) -> None:
            calls[0] += 1

        engine._module.lm.model.layers[0].mlp.register_forward_pre_hook(count)
        engine.policy_step(samples)
        results.append(weights(engine))
        passes.append(calls[0])
    assert passes[1] == 2 * passes[0]
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-6, rtol=0)


def test_targets(tiny_model: Path) -> None:
    engine = DeepSpeedEngine(config(tiny_model, lora=LoraConfig(targets=("q_proj", "v_proj"))))
    assert {name.rpartition(".")[2] for name in adapters.layers(engine._module.lm)} == {"q_proj", "v_proj"}
    for targets, message in (
        (("nothing",), "nothing.*not found"),
        (("embed_tokens",), "lora.targets: model.embed_tokens is a Embedding, not a linear layer"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepSpeedEngine(config(tiny_model, lora=LoraConfig(targets=targets)))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_far_below_bfloat16_s_resolution_stays_in_the_adapters(
    tiny_model: Path, samples: list[Sample], zero_stage: int
) -> None:
    """A's entries are near 0.1, where bfloat16's numbers are 5e-4 apart. B is 0 at first, so A moves from step 2 on."""
    engine = DeepSpeedEngine(config(tiny_model, dtype="bfloat16", zero_stage=zero_stage, lr=1e-6, eps=1e-12))
    before = {name: tensor.clone() for name, tensor in engine.adapter_weights()}
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights(engine).values()} == {torch.bfloat16}, "the model keeps its type"
    for _ in range(3):
        engine.policy_step(samples)
    after = {name: tensor.clone() for name, tensor in engine.adapter_weights()}
    for matrix, least in (("lora_A", 1e-6), ("lora_B", 2e-6)):
        moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before if matrix in name])
        assert moved.mean() > least, f"{matrix}: Adam's step is up to lr = 1e-6 for each entry"
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).state_dict()
    published = weights(engine)
    for name in adapters.layers(engine._module.lm):
        a, b = (after[adapters.peft_name(name, matrix)].double() for matrix in ("lora_A", "lora_B"))
        exact = plain[f"{name}.weight"].double() + LORA.alpha / LORA.rank * (b @ a)
        error = (published[f"{name}.weight"].double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 * 1.001).all(), "rounded once, at the end: half a step of bfloat16"


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_exported_adapters_load_in_peft_and_are_the_merged_model(
    tiny_model: Path, samples: list[Sample], pairs: list[Pair], tmp_path: Path, head: str, zero_stage: int
) -> None:
    import peft

    lora = LoraConfig(rank=4, alpha=10, targets=("q_proj", "down_proj"))
    engine = DeepSpeedEngine(config(tiny_model, head=head, lora=lora, zero_stage=zero_stage))
    for _ in range(3):
        engine.sft_step(samples) if head == "lm" else engine.pair_step(pairs)
    engine.export_hf(tmp_path / "exported")
    kind = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    labels = {} if head == "lm" else {"num_labels": 1}
    base = kind.from_pretrained(tiny_model, dtype=torch.float32, **labels)
    ids = torch.from_numpy(samples[0].ids.astype(np.int64))[None]
    with torch.no_grad():
        untrained = base(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "exported" / "adapter")(input_ids=ids).logits
        merged = kind.from_pretrained(tmp_path / "exported", dtype=torch.float32, **labels)(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=0)
    assert (adapted - untrained).abs().max() > 1e-3
    description = peft.PeftConfig.from_pretrained(tmp_path / "exported" / "adapter")
    assert (description.base_model_name_or_path, description.inference_mode) == (str(tiny_model), True)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_adapters_are_published_by_themselves(tiny_model: Path, samples: list[Sample], zero_stage: int) -> None:
    """With the scale in B: what is published alone gives the weights that are published merged."""
    lora = LoraConfig(rank=4, alpha=10)
    engine = DeepSpeedEngine(config(tiny_model, lora=lora, zero_stage=zero_stage, weight_sync="adapter"))
    engine.policy_step(samples)
    sums = PublishedSums("float32")
    update = adapter_update(engine, HostMemory(), sums)
    assert update is not None
    assert (update.backend, update.policy_version) == ("adapter", 1)
    tensors = {name: torch.from_numpy(array.copy()) for name, (array, _) in update.payload.items()}
    assert [tuple(tensor.shape) for tensor in tensors.values()] == list(update.shapes)
    assert sums.finish(1).sums == {name: int(checksum(tensor, torch.float32)) for name, tensor in tensors.items()}
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    merged = weights(engine)
    for name in adapters.layers(engine._module.lm):
        a, b = (tensors[adapters.peft_name(name, matrix)] for matrix in ("lora_A", "lora_B"))
        torch.testing.assert_close(plain[f"{name}.weight"] + b @ a, merged[f"{name}.weight"], atol=1e-6, rtol=0)
    half = adapter_update(engine, HostMemory(), PublishedSums("bfloat16"))
    assert half is not None
    assert set(half.dtypes) == {"bfloat16"}, "in the engine's type: half the bytes"
