"""What `--dry-run` prints, against published parameter counts and sums done by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

from autotraj.config.run import RunConfig, load
from autotraj.errors import UserError
from autotraj.planning.model_size import model_size, num_adapter_parameters
from autotraj.planning.plan import GIB, plan, render_plan
from learners.config import LoraConfig
from models.on_disk import tensor_shapes

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
RECIPES = ["qwen2.5-3b", "qwen2.5-7b", "qwen2.5-32b", "qwen3-8b"]


def recipe(name: str, *overrides: str) -> RunConfig:
    # The hand-computed figures are of an engine that holds a trajectory and no repair prompt.
    return load(EXAMPLES / name / "run.toml", ["engine.max_model_len=2816", *overrides])


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_lora"),
    [
        ("qwen2.5-3b", 3_085_938_688, 29_933_568),
        ("qwen2.5-7b", 7_615_616_512, 40_370_176),
        ("qwen2.5-32b", 32_763_876_352, 134_217_728),
        ("qwen3-8b", 8_190_735_360, 43_646_976),
    ],
)
def test_published_sizes(name: str, num_parameters: int, num_lora: int) -> None:
    assert model_size(name).num_parameters == num_parameters
    assert num_adapter_parameters(name, LoraConfig(rank=16)) == num_lora


HEADS = {"num_attention_heads": 32, "head_dim": 128, "tie_word_embeddings": False}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Llama-3.1-8B": (
        HEADS
        | {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        8_030_261_248,
        131_072,
    ),
    "Mixtral-8x7B": (
        HEADS
        | {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
        },
        46_702_792_704,
        131_072,
    ),
    "Qwen3-30B-A3B": (
        HEADS
        | {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
        },
        30_532_122_624,
        98_304,
    ),
}
"""Published model → the values of its config.json that give its shape, its parameters, and its KV bytes a token in bfloat16:
2 · layers · KV heads · 128 · 2."""


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models(name: str, tmp_path: Path) -> None:
    config, num_parameters, kv_bytes = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = model_size(str(tmp_path))
    assert size.num_parameters == num_parameters
    assert size.num_output_layer == config["vocab_size"] * config["hidden_size"]
    heads = config["num_key_value_heads"]
    assert size.kv_bytes_per_token(2) == kv_bytes
    assert size.kv_bytes_per_token(2, heads) == size.kv_bytes_per_token(2, 2 * heads) == kv_bytes // heads


TINY: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {f"linear_{name}": n for name, n in [("num_key_heads", 2), ("num_value_heads", 4), ("key_head_dim", 16)]}
ARCHITECTURES: dict[str, tuple[PreTrainedConfig, int]] = {
    "llama": (LlamaConfig(**TINY), 4),
    "llama-tied": (LlamaConfig(**TINY, tie_word_embeddings=True), 4),
    "phi3": (Phi3Config(**TINY, pad_token_id=0), 4),
    "gemma3": (Gemma3TextConfig(**TINY, head_dim=16), 4),
    "gpt2": (GPT2Config(vocab_size=330, n_embd=64, n_layer=4, n_head=4), 4),
    "mixtral": (MixtralConfig(**TINY, num_local_experts=4), 4),
    "qwen3-moe": (Qwen3MoeConfig(**TINY, **ROUTED, head_dim=16), 4),
    "deepseek-v3": (
        DeepseekV3Config(
            **TINY | {"num_key_value_heads": 4},
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        ),
        4,
    ),
    # Three of its layers are of linear attention, which keeps no keys.
    "qwen3.5": (Qwen3_5TextConfig(**TINY, **LINEAR, linear_value_head_dim=16, head_dim=16), 1),
}
"""Configuration → how many of its layers keep keys and values."""


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_count_is_that_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    config, num_kv_layers = ARCHITECTURES[name]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = {key: math.prod(shape) for key, shape in tensor_shapes(str(tmp_path)).items() if "e_score_corr" not in key}
    size = model_size(str(tmp_path))
    assert size.num_parameters == sum(stored.values())
    assert len(size.block_widths) == 4
    assert size.num_output_layer == (0 if name in ("llama-tied", "gemma3", "gpt2") else 330 * 64)
    assert size.num_kv_layers == num_kv_layers


def test_adapters_on_some_layers() -> None:
    # 28 blocks, rank 8: q has 3584 inputs and outputs, v 3584 inputs and 512 outputs.
    lora = LoraConfig(rank=8, targets=("q_proj", "v_proj"))
    assert num_adapter_parameters("qwen2.5-7b", lora) == 28 * 8 * (7168 + 4096)
    with pytest.raises(UserError, match="no_such_proj"):
        num_adapter_parameters("qwen2.5-7b", LoraConfig(targets=("no_such_proj",)))


def test_a_plan_alone_imports_nothing_heavy() -> None:
    """Only a size that is asked for imports torch and transformers."""
    code = (
        "import sys\nimport autotraj.planning.plan, autotraj.planning.preflight\n"
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_mixture_is_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-30B-A3B"][0]))
    text = render_plan(
        plan(
            recipe(
                "qwen3-8b",
                f"model={tmp_path}",
                'stages=["synthesize", "sft", "grpo"]',
                "sft.lr=1e-4",
                *(f'{name}.lora.targets=["q_proj", "v_proj"]' for name in ("learner", "sft")),
            )
        )
    )
    assert "30.53 B parameters" in text
    assert "problem" not in text


def test_models_by_name_and_those_nobody_knows(tmp_path: Path) -> None:
    assert model_size("models/Qwen2.5-7B-Instruct") == model_size("qwen2.5-7b")
    with pytest.raises(UserError, match=r"names none of qwen2\.5-3b, .*; download it first"):
        model_size("models/other")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"config\.json can't be planned with: JSONDecodeError"),
        ("{}", "KeyError: 'model_type'"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "ZeroDivisionError"),
        ('{"model_type": "modernbert-decoder"}', "its blocks aren't numbered"),
        ('{"model_type": "mamba"}', "'MambaConfig' object has no attribute 'num_attention_heads'"),
        ('{"model_type": "qwen2_5_vl"}', "has no causal language model of model_type 'qwen2_5_vl'"),
        (
            json.dumps(
                {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}}
            ),
            "code that comes with a model is never run",
        ),
        ('{"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "own.Model"}}', ""),
    ],
)
def test_a_configuration_that_cannot_be_built(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "own.py").write_text("raise SystemExit('the code of a model ran')")
    if not said:  # transformers' own code is used for an architecture that it knows
        assert model_size(str(tmp_path)).num_parameters > 0
        return
    with pytest.raises(UserError, match=said):
        model_size(str(tmp_path))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "qwen2.5-32b"])
def test_recipes_have_the_papers_settings_and_fit_their_gpus(name: str) -> None:
    config = recipe(name)
    assert (config.rollout.group_size, config.learner.lr, config.loss.kl_coef) == (4, 2e-5, 0.0)
    assert (config.episode.max_prompt_tokens, config.episode.max_response_tokens) == (768, 2048)
    assert (config.episode.max_tool_calls, config.episode.max_turns, config.reward.preset) == (3, 10, "paper")
    assert config.learner.lora is not None
    assert (config.learner.lora.rank, config.learner.lora.alpha) == (16, 32)
    planned = plan(config)
    assert planned.problems == ()
    assert (planned.num_trajectories, planned.max_tokens) == (200 * 64 * 4, 200 * 64 * 4 * 2816)
    assert planned.num_gpus == (5 if name == "qwen2.5-3b" else 9)  # the reward model's actor takes one
    assert [stage.name for stage in planned.stages] == ["base", "sft", "reward-model", "grpo"]
    assert planned.num_eval_trajectories is None


def test_a_large_model_shares_gpus() -> None:
    planned = plan(recipe("qwen2.5-32b"))
    assert (planned.problems, planned.num_gpus) == ((), 16)
    rollout, learner = planned.actors("grpo")
    assert rollout.memory["weights"] == 2 * 32_763_876_352 // 4  # an engine on four
    assert learner.memory["weights"] == (2 * 32_763_876_352 + 4 * 134_217_728) // 8  # ZeRO-3 on eight


def test_a_stage_that_does_not_fit_is_named() -> None:
    """GRPO trains adapters and fits; SFT of all weights doesn't."""
    config = recipe("qwen2.5-32b")
    whole = config.model_copy(update={"sft": config.sft.model_copy(update={"lora": None})})
    planned = plan(whole)
    (learner,) = planned.actors("sft")
    assert learner.memory["optimizer"] == 12 * 32_763_876_352 // 8
    assert planned.problems == (
        "sft: learner needs about 90.2 GiB of a GPU's 80.0 GiB: lower learner.micro_batch_tokens, train with sft.lora, "
        "raise learner.num_learners",
    )


def test_stages_have_the_actors_that_are_alive_together() -> None:
    def names(config: RunConfig) -> list[tuple[str, list[str]]]:
        return [(stage.name, [actor.name for actor in stage.actors]) for stage in plan(config).stages]

    config = recipe("qwen2.5-7b", "online_repair.enabled=true")
    assert names(config) == [
        ("base", ["rollout"]),
        ("sft", ["learner"]),
        ("reward-model", ["reward-model learner"]),
        ("grpo", ["rollout", "learner", "reward model", "reward-model learner"]),
    ]
    assert names(recipe("qwen2.5-7b", 'stages=["grpo"]')) == [("base", ["rollout"]), ("grpo", ["rollout", "learner"])]
    assert names(recipe("qwen2.5-7b", "stages=[]")) == [("base", ["rollout"])]


def test_memory_by_hand() -> None:
    planned = plan(recipe("qwen2.5-7b"))
    rollout, learner, _ = planned.actors("grpo")
    assert (rollout.count, rollout.num_gpus, learner.count, learner.num_gpus) == (4, 1, 4, 1)
    assert rollout.memory == {
        "weights": 2 * 7_615_616_512,
        # 0.9 · 80 GiB less weights and overhead; keys and values take 2 · 28 · 4 · 128 · 2 = 57,344 bytes a token
        "KV cache": 77_309_411_328 - 15_231_233_024 - 2 * GIB,
        "overhead": 2 * GIB,
    }
    assert rollout.note.startswith("371 trajectories of 2816 tokens at once")  # 59,930,694,656 / (2816 · 57,344)
    assert learner.memory == {
        "weights": 2 * 7_615_616_512 + 4 * 40_370_176,  # adapters are float32
        "gradients": 40_370_176,  # 4T over 4 ranks
        "optimizer": 3 * 40_370_176,  # 12T over 4 ranks
        "activations": 16_384 * 2 * 28 * 3584,  # the inputs of 28 blocks, two bytes each
        # One block of 4 · 3584 + 2 · 3584 + 2 · 512 + 3 · 18944 = 79,360 numbers a token, 1.9 times two bytes; a bucket of
        # all gradients in float32, and its copy. The output layer is frozen, and the logits' 3 · 512 MiB are less.
        "peak": 16_384 * 2 * 150_784 + 2 * 4 * 40_370_176,
        "overhead": 2 * GIB,
    }
    checkpoint = 2 * 7_615_616_512 + 12 * 40_370_176
    assert planned.disk == {
        "checkpoints": 3 * checkpoint,
        "trained policy": 15_231_233_024,
        "trajectory log": 51_200 * 2816 * 17,
    }


def test_zero_shards_by_stage() -> None:
    num = 3_085_938_688
    whole = {"gradients": 4 * num, "optimizer": 12 * num, "weights": 2 * num}
    sharded: dict[int, set[str]] = {
        0: set(),
        1: {"optimizer"},
        2: {"optimizer", "gradients"},
        3: {"optimizer", "gradients", "weights"},
    }
    for stage, names in sharded.items():
        config = recipe("qwen2.5-3b", f"learner.zero_stage={stage}")
        full = config.model_copy(update={"learner": config.learner.model_copy(update={"lora": None})})
        memory = plan(full).actors("grpo")[1].memory
        for name, size in whole.items():
            expected = size // 2 if name in names else size
            # Without ZeRO gradients stay in bfloat16; ZeRO-1 adds them up in float32 beside these.
            each = {("gradients", 0): num * 2, ("gradients", 1): num * 6}
            assert memory[name] == each.get((name, stage), expected), (stage, name)


def test_a_reference_and_a_reward_model_are_in_the_plan() -> None:
    config = recipe("qwen2.5-7b", "loss.kl_coef=0.01", "loss.kl_estimator=k3")
    planned = plan(config)
    assert "reference" not in planned.actors("grpo")[1].memory, "it is the policy without its adapters"
    full = config.model_copy(update={"learner": config.learner.model_copy(update={"lora": None})})
    assert plan(full).actors("grpo")[1].memory["reference"] == 2 * 7_615_616_512
    assert "reference" not in plan(full).actors("sft")[0].memory
    reward_model = planned.actors("grpo")[2]
    # Without the output layer of 152064 · 3584, with a head of 3584; twice, for a swap.
    assert reward_model.memory["weights"] == 4 * (7_615_616_512 - 152_064 * 3584 + 3584)
    assert planned.num_gpus == 9
    learner = planned.actors("reward-model")[0]
    assert learner.memory["weights"] == 2 * (7_615_616_512 - 152_064 * 3584 + 3584) + 4 * (20_185_088 + 3584)


def test_nccl_takes_memory_outside_of_the_engines_share() -> None:
    """vLLM's packed transfer has two buffers of 256 MiB, the second of which the embedding of 152064 · 3584 may overfill."""
    planned = plan(recipe("qwen2.5-7b", "engine.weight_transfer=nccl"))
    rollout, learner, *_ = planned.actors("grpo")
    assert rollout.memory["transfer"] == learner.memory["transfer"] == 2 * 256 * 1024**2 + 2 * 152_064 * 3584
    assert "transfer" not in planned.actors("sft")[0].memory
    assert planned.problems == ()
    tight = plan(recipe("qwen2.5-7b", "engine.weight_transfer=nccl", "engine.gpu_memory_utilization=0.985"))
    assert tight.problems[-1].startswith("grpo: rollout needs about 80.3 GiB of a GPU's 80.0 GiB: raise ")


def test_what_does_not_fit_is_said() -> None:
    small = plan(recipe("qwen3-8b"), gpu_gib=16)
    assert [problem.split(" needs")[0] for problem in small.problems[:-1]] == [
        "base: rollout", "sft: learner", "reward-model: reward-model learner", "grpo: rollout", "grpo: learner",
        "grpo: reward model",
    ]  # fmt: skip
    assert small.problems[-1] == "rollout: the KV cache has no room for one trajectory of 2816 tokens"
    narrow = plan(recipe("qwen3-8b", "engine.max_model_len=50000"))
    assert narrow.problems == ("engine.max_model_len = 50000 exceeds the model's 40960 positions",)


def test_a_learning_rate_that_is_too_small_for_adapters_is_said() -> None:
    slow = plan(recipe("qwen2.5-3b", "learner.lr=1e-6", "reward_model.lr=9e-6"))
    assert [problem.split(" is too small")[0] for problem in slow.problems] == [
        "reward_model.lr = 9e-06",
        "learner.lr = 1e-06",
    ]
    assert "Set 1e-5 to 1e-4" in slow.problems[0]
    assert plan(recipe("qwen2.5-3b", "learner.lr=1e-6", "learner.dtype=float32")).problems == (), "nothing is rounded"
    config = recipe("qwen2.5-3b", "learner.lr=1e-6", "learner.zero_stage=3")
    full = config.model_copy(update={"learner": config.learner.model_copy(update={"lora": None})})
    assert not any("too small" in problem for problem in plan(full).problems), (
        "all weights have their own master copies"
    )


def test_the_plan_of_a_run_on_cpus() -> None:
    config = load(EXAMPLES / "tiny/grpo.toml", [f"model={EXAMPLES / 'tiny/base'}"])
    planned = plan(config)
    rollout, learner, *_ = planned.actors("grpo")
    num = planned.num_parameters
    assert (planned.num_gpus, planned.problems) == (0, ())
    assert rollout.memory == {"weights": 4 * num, "KV cache": GIB, "overhead": 3 * GIB}
    assert (learner.memory["weights"], learner.memory["optimizer"]) == (4 * num, 8 * num)


@pytest.mark.parametrize("name", RECIPES)
def test_the_text(name: str) -> None:
    text = render_plan(plan(recipe(name)))
    assert "200 steps, 51,200 trajectories" in text
    assert "LoRA of rank 16" in text
    assert "problem" not in text
    assert max(map(len, text.splitlines())) <= 160
    assert "problem      grpo: learner needs about" in render_plan(plan(recipe(name), gpu_gib=8))
