"""ZeRO-3 on two ranks whose parameters really come and go: they are larger than what DeepSpeed keeps whole (100,000)."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from learners.batching import Sample
from learners.config import LearnerConfig, LoraConfig, LossConfig
from learners.engine import DeepSpeedEngine
from learners.model import load_model

pytestmark = pytest.mark.slow

VOCAB = 4096
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(path)
    return path


def sample(length: int, num_loss_tokens: int, seed: int) -> Sample:
    """Its last tokens carry the loss."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(length - 5, dtype=np.bool_)
    mask[len(mask) - num_loss_tokens :] = True
    return Sample(
        ids=rng.integers(1, VOCAB, length).astype(np.int32),
        prompt_len=5,
        mask=mask,
        behaviour_logprobs=np.where(mask, rng.normal(-8.3, 0.1, len(mask)), 0.0).astype(np.float32),
        advantage=float(rng.normal()),
    )


def config(model: Path, **settings: Any) -> LearnerConfig:
    defaults = {"lr": 3e-3, "eps": 1e-3, "micro_batch_tokens": 256, "zero_stage": 3, "logit_chunk_mib": 1}
    return LearnerConfig(model=str(model), **(defaults | settings))


UNEQUAL = [sample(200, 190, 1), sample(199, 10, 2)]  # each rank gets one: 3 blocks of at most 64 rows, and 1
BATCHES = {
    "unequal": UNEQUAL,
    "one rank without a loss token": UNEQUAL[:1],
    "several micro-batches": [sample(150 + i, n, i) for i, n in enumerate((140, 3, 70, 1, 30, 100))],
    "a constant group": [*UNEQUAL, *(Sample(ids=s.ids, prompt_len=5, mask=s.mask) for s in UNEQUAL)],
}


LOSS = LossConfig(algorithm="grpo", is_max=1.5, kl_estimator="k3", kl_coef=0.1)


def train(settings: list[LearnerConfig], batches: list[list[Sample]]) -> list[tuple[list[float], dict[str, Any]]]:
    """For each settings, the losses of a step on each batch and the weights after the last."""
    found = []
    for each in settings:
        engine = DeepSpeedEngine(each, LOSS)
        losses = [engine.policy_step(batch)["loss"] for batch in batches]
        found.append((losses, {name: tensor.clone() for name, tensor in engine.full_weights()}))
    return found


def test_ranks_with_unequal_numbers_of_logit_blocks_train_as_one_rank_does(model: Path, tmp_path: Path) -> None:
    """Against one rank without ZeRO, which shards nothing and loads in the plain way."""
    torch.manual_seed(1)
    tied, mixture = tmp_path / "tied", tmp_path / "mixture"
    Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"tie_word_embeddings": True})).save_pretrained(tied)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts)).save_pretrained(mixture)
    settings = [
        config(model),
        config(model, gradient_checkpointing=True, weight_decay=0.1),
        config(model, lora=LoraConfig(rank=4), num_minibatches=2),
        config(tied, attention="varlen"),
        config(mixture),
    ]
    batches = [*BATCHES.values(), UNEQUAL]
    plain = [each.model_copy(update={"zero_stage": 0}) for each in settings]
    (expected,) = on_ranks(1, tmp_path, train, plain, batches)
    for found in on_ranks(2, tmp_path, train, settings, batches):
        for (losses, weights), (losses_of_one, weights_of_one) in zip(found, expected, strict=True):
            assert losses == pytest.approx(losses_of_one, abs=1e-6)
            assert_same(weights, weights_of_one, atol=1e-6)


def types(settings: LearnerConfig) -> tuple[set[torch.dtype], set[torch.dtype], float]:
    """The types of what is frozen and of what is trained, as loaded, and the loss of a step."""
    loaded = load_model(settings.model, settings, torch.device("cpu"))
    frozen, trained = ({p.dtype for p in loaded.parameters() if p.requires_grad is way} for way in (False, True))
    return frozen, trained, DeepSpeedEngine(settings).policy_step(UNEQUAL)["loss"]


def test_a_model_in_bfloat16_stays_so_below_adapters(model: Path, tmp_path: Path) -> None:
    settings = config(model, dtype="bfloat16", lora=LoraConfig(rank=4))
    ((*_, expected),) = on_ranks(1, tmp_path, types, settings.model_copy(update={"zero_stage": 2}))
    for frozen, trained, loss in on_ranks(2, tmp_path, types, settings):
        assert (frozen, trained) == ({torch.bfloat16}, {torch.float32})
        assert loss == pytest.approx(expected, abs=1e-2)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("single_rank")
def test_an_adapter_of_the_output_layer_is_refused(model: Path) -> None:
    lora = LoraConfig(targets=("q_proj", "lm_head"))
    with pytest.raises(ValueError, match=r"lora.targets: the output layer .* zero_stage=3.* set zero_stage=2"):
        DeepSpeedEngine(config(model, lora=lora))
    DeepSpeedEngine(config(model, lora=lora, zero_stage=2))


def load(settings: LearnerConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """The most bytes that the load took at a time, mapped files left out, and the weights of the engine."""
    settle = load_model(
        settings.model, settings.model_copy(update={"zero_stage": 0}), torch.device("cpu")
    )  # imports all
    del settle
    with AnonymousPeak() as peak:
        load_model(settings.model, settings, torch.device("cpu"))
    engine = DeepSpeedEngine(settings)
    return peak.taken, {name: tensor.clone() for name, tensor in engine.full_weights()}


class AnonymousPeak:
    """How far this process's memory rose within the context, bytes, without mapped files."""

    def __enter__(self) -> "AnonymousPeak":
        self._before = self._highest = _anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self._highest = max(self._highest, _anonymous())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.taken = self._highest - self._before


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def test_no_rank_holds_the_whole_model_while_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in bfloat16 of 50M parameters, which take 200 MB in float32."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the kernel
    torch.manual_seed(0)
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 8}
    made = Qwen3ForCausalLM(Qwen3Config(**shape)).bfloat16()
    made.save_pretrained(tmp_path / "model")
    whole = 4 * made.num_parameters()
    for stage, least, most in ((2, 0.95, 2.0), (3, 0.0, 0.7)):
        for taken, weights in on_ranks(2, tmp_path, load, config(tmp_path / "model", zero_stage=stage)):
            assert least < taken / whole < most, f"stage {stage}: {taken / whole:.2f} of the model"
            assert_same(weights, {name: p.detach().float() for name, p in made.named_parameters()}, atol=0)
