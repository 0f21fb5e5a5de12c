"""What `--dry-run` prints, against published parameter counts and sums done by hand."""

import json
import math
from pathlib import Path

import pytest

from actors.config import ScorerConfig
from autotraj.config.run import RunConfig, load
from autotraj.errors import UserError
from autotraj.planning.model_size import KNOWN, architecture
from autotraj.planning.plan import GIB, plan, render_plan
from models.on_disk import tensor_shapes

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
    assert KNOWN[name].num_parameters == num_parameters
    assert KNOWN[name].num_lora_parameters(16) == num_lora


def test_adapters_on_some_layers() -> None:
    # 28 blocks, rank 8: q has 3584 inputs and outputs, v 3584 inputs and 512 outputs.
    assert KNOWN["qwen2.5-7b"].num_lora_parameters(8, ("q_proj", "v_proj")) == 28 * 8 * (7168 + 4096)


def test_a_checkpoint_that_is_there_is_read() -> None:
    tiny = EXAMPLES / "tiny/base"
    assert architecture(str(tiny)).num_parameters == sum(map(math.prod, tensor_shapes(str(tiny)).values()))


def test_models_by_name_and_those_nobody_knows(tmp_path: Path) -> None:
    assert architecture("models/Qwen2.5-7B-Instruct") == KNOWN["qwen2.5-7b"]
    with pytest.raises(UserError, match=r"names none of qwen2\.5-3b, .*; download it first"):
        architecture("models/other")
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 8, "hidden_size": 4}))
    with pytest.raises(UserError, match="a mixture of experts"):
        architecture(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(UserError, match="num_attention_heads is None"):
        architecture(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json can't be planned with"):
        architecture(str(tmp_path))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "qwen2.5-32b"])
def test_recipes_have_the_papers_settings_and_fit_their_gpus(name: str) -> None:
    config = recipe(name)
    assert (config.rollout.group_size, config.learner.lr, config.loss.kl_coef) == (4, 1e-6, 0.0)
    assert (config.episode.max_prompt_tokens, config.episode.max_response_tokens) == (768, 2048)
    assert (config.episode.max_tool_calls, config.episode.max_turns, config.reward.preset) == (3, 10, "paper")
    assert config.learner.lora is not None
    assert (config.learner.lora.rank, config.learner.lora.alpha) == (16, 32)
    planned = plan(config)
    assert planned.problems == ()
    assert (planned.num_trajectories, planned.max_tokens) == (200 * 64 * 4, 200 * 64 * 4 * 2816)
    assert planned.num_gpus == (4 if name == "qwen2.5-3b" else 8)
    assert planned.num_eval_trajectories is None


def test_a_large_model_shares_gpus() -> None:
    planned = plan(recipe("qwen2.5-32b"))
    assert (planned.problems, planned.num_gpus) == ((), 16)
    rollout, learner = planned.actors
    assert rollout.memory["weights"] == 2 * 32_763_876_352 // 4  # an engine on four
    assert learner.memory["weights"] == 2 * (32_763_876_352 + 134_217_728) // 8  # ZeRO-3 on eight


def test_memory_by_hand() -> None:
    planned = plan(recipe("qwen2.5-7b"))
    rollout, learner = planned.actors
    assert (rollout.count, rollout.num_gpus, learner.count, learner.num_gpus) == (4, 1, 4, 1)
    assert rollout.memory == {
        "weights": 2 * 7_615_616_512,
        # 0.9 · 80 GiB less weights and overhead; keys and values take 2 · 28 · 4 · 128 · 2 = 57,344 bytes a token
        "KV cache": 77_309_411_328 - 15_231_233_024 - 2 * GIB,
        "overhead": 2 * GIB,
    }
    assert rollout.note.startswith("371 trajectories of 2816 tokens at once")  # 59,930,694,656 / (2816 · 57,344)
    assert learner.memory == {
        "weights": 2 * (7_615_616_512 + 40_370_176),
        "gradients": 40_370_176,  # 4T over 4 ranks
        "optimizer": 3 * 40_370_176,  # 12T over 4 ranks
        # 28 inputs of 3584; one block of 4 · 3584 + 2 · 3584 + 2 · 512 + 3 · 18944 = 79,360, 3.1 times; two bytes each
        "activations": 16_384 * 2 * (28 * 3584 + 246_016),
        "logits": 4 * 512 * 1024**2,  # the output layer is frozen
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
        memory = plan(full).actors[1].memory
        for name, size in whole.items():
            expected = size // 2 if name in names else size
            assert memory[name] == (num * 2 if (name, stage) == ("gradients", 0) else expected), (stage, name)


def test_a_reference_and_a_reward_model_are_in_the_plan() -> None:
    config = recipe("qwen2.5-7b", "loss.kl_coef=0.01", "loss.kl_estimator=k3")
    planned = plan(config, reward_model=ScorerConfig(num_gpus=1))
    assert "reference" not in planned.actors[1].memory, "it is the policy without its adapters"
    full = config.model_copy(update={"learner": config.learner.model_copy(update={"lora": None})})
    assert plan(full).actors[1].memory["reference"] == 2 * 7_615_616_512
    reward_model = planned.actors[2]
    # Without the output layer of 152064 · 3584, with a head of 3584; twice, for a swap.
    assert reward_model.memory["weights"] == 4 * (7_615_616_512 - 152_064 * 3584 + 3584)
    assert planned.num_gpus == 9


def test_what_does_not_fit_is_said() -> None:
    small = plan(recipe("qwen3-8b"), gpu_gib=16)
    assert [problem.split(":")[0] for problem in small.problems] == ["rollout", "learner", "rollout"]
    assert "needs about" in small.problems[0]
    assert "the KV cache holds not one trajectory of 2816 tokens" in small.problems[2]
    narrow = plan(recipe("qwen3-8b", "engine.max_model_len=50000"))
    assert narrow.problems == ("engine.max_model_len = 50000 exceeds the model's 40960 positions",)


def test_the_plan_of_a_run_on_cpus() -> None:
    config = load(EXAMPLES / "tiny/grpo.toml", [f"model={EXAMPLES / 'tiny/base'}"])
    planned = plan(config)
    rollout, learner = planned.actors
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
    assert "problem      learner: needs about" in render_plan(plan(recipe(name), gpu_gib=8))
