"""The supervised stages without their learners: order of batches, what is read, what is held out."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replies import CLEAN, POOR
from tiny_run import ROOT, tiny
from transformers import AutoTokenizer

from autotraj.config.stage_registry import SFT, SFT_FILE, SYNTHESIZE
from autotraj.errors import UserError
from autotraj.interrupt import Interrupt
from autotraj.preferences import pairs
from autotraj.stages import sft
from autotraj.training import supervised
from learners.config import LearnerConfig
from trajectory.markup import render_result
from trajectory.records import preference_record, sft_record, write_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "examples/tiny/base")


def test_every_epoch_takes_every_item_once_in_an_order_of_its_own() -> None:
    plan = list(supervised.batches(10, 4, 2, seed=1))
    assert [len(batch) for batch in plan] == [4, 4, 2, 4, 4, 2]
    assert len(plan) == supervised.num_steps(10, 4, 2)
    first, second = list(chain(*plan[:3])), list(chain(*plan[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert plan == list(supervised.batches(10, 4, 2, seed=1))


def test_a_stage_without_its_input_says_which_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="python -m autotraj synthesize"):
        supervised.require(tmp_path / "sft.jsonl", "synthesize")


def test_an_interrupted_run_says_what_it_has_not_got() -> None:
    said = supervised.remaining(["synthesize", "sft", "grpo"], {"base": {}, "synthesize": {}})
    assert said.startswith("Done: synthesize; still to do: sft, grpo. A stage writes its model when it is done")
    assert supervised.remaining(["sft"], {}).startswith("Done: none of its stages; still to do: sft.")


def test_the_learners_of_a_stage_are_the_runs_with_another_objective() -> None:
    base = LearnerConfig(model="policy", num_learners=2, zero_stage=3, lr=1e-6, num_minibatches=4)
    made = supervised.learner_config(base, model="base", lr=1e-3, steps=100, warmup_ratio=0.1, lora=None, head="scalar")
    assert (made.num_learners, made.zero_stage, made.num_minibatches) == (2, 3, 1)
    assert (made.model, made.lr, made.schedule, made.total_steps, made.warmup_steps) == (
        "base",
        1e-3,
        "cosine",
        100,
        10,
    )
    assert made.head == "scalar"


def test_repaired_trajectories_are_left_out_when_asked(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "sft.jsonl"
    write_jsonl(
        path,
        [
            sft_record("What is 2 times 3?", CLEAN, "", task_id="a", source="kept", quality=1.0),
            sft_record("What is 2 times 3?", CLEAN, "", task_id="b", source="repaired", quality=1.0),
        ],
    )
    both = sft.load_samples(path, tokenizer, tokenizer.eos_token_id, include_repaired=True)
    kept = sft.load_samples(path, tokenizer, tokenizer.eos_token_id, include_repaired=False)
    assert (len(both), len(kept)) == (2, 1)
    sample = kept[0]
    response = sample.ids[sample.prompt_len :]
    assert len(sample.mask) == len(response)
    hidden = tokenizer.decode(response[~sample.mask])
    assert hidden == render_result("6\n", max_chars=100)
    assert tokenizer.decode(response[sample.mask]).endswith("</answer><|im_end|>")


def test_trajectories_that_are_all_too_long_are_told_before_any_learner_starts(tmp_path: Path) -> None:
    config = tiny(tmp_path, "learner.micro_batch_tokens=20", 'stages=["synthesize", "sft"]')
    record = sft_record("What is 2 times 3?", CLEAN, "", task_id="a", source="kept", quality=1.0)
    path = config.folder / SYNTHESIZE.folder / SFT_FILE
    path.parent.mkdir(parents=True)
    write_jsonl(path, [record, record])
    with pytest.raises(
        UserError, match=r"all 2 trajectories are longer than a micro-batch of the learner, 20 tokens; the shortest"
    ):
        sft.sft(config, interrupt=Interrupt(), on_step=lambda step, num_steps, metrics: None)
    assert not (config.folder / SFT.folder).exists()


@pytest.mark.parametrize("mask_results", [True, False])
def test_pairs_are_split_by_question_and_cut_as_the_actor_cuts_them(
    tmp_path: Path, tokenizer: Any, mask_results: bool
) -> None:
    path = tmp_path / "preferences.jsonl"
    records = [preference_record("What is 2 times 3?", CLEAN, POOR, "", task_id=str(i // 2)) for i in range(200)]
    write_jsonl(path, records)
    found = pairs.load_pairs(path, tokenizer, margin=0.5, mask_results=mask_results, held_out=0.2, max_tokens=10_000)
    assert len(found.train) + len(found.held_out) == 200
    assert 20 <= len(found.held_out) <= 60  # 40 expected
    assert all(len(group) % 2 == 0 for group in (found.train, found.held_out))  # both pairs of a question on one side
    pair = found.train[0]
    assert pair.margin == 0.5
    assert ("<result>" in tokenizer.decode(pair.chosen)) is not mask_results
    assert "perhaps" in tokenizer.decode(pair.rejected)
    short = pairs.load_pairs(
        path, tokenizer, margin=0.0, mask_results=mask_results, held_out=0.2, max_tokens=len(pair.chosen)
    )
    assert short.num_too_long == 200


def test_pair_accuracy_by_hand() -> None:
    found = pairs.pair_accuracy(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -3.0]))
    assert found.accuracy == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.margin_mean == pytest.approx((1 + 0 - 1 + 3) / 4)


def test_an_own_file_with_inline_results_learns_nothing_of_them_and_a_broken_one_is_refused(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "sft.jsonl"
    inline = CLEAN.replace(render_result("6\n", max_chars=100), "<result>6</result>")
    write_jsonl(path, [sft_record("What is 2 times 3?", inline, "")])  # no task id, no source: written by hand
    (sample,) = sft.load_samples(path, tokenizer, None, include_repaired=True)
    assert tokenizer.decode(sample.ids[sample.prompt_len :][~sample.mask]) == "<result>6</result>"
    write_jsonl(path, [sft_record("q", reply, "") for reply in (CLEAN, CLEAN.replace("</result>", ""))])
    with pytest.raises(ValueError, match=r"sft\.jsonl, line 2: a <result> that is not closed"):
        sft.load_samples(path, tokenizer, None, include_repaired=True)


def test_stages_with_data_of_ones_own_need_no_stage_that_makes_it(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="stages: 'sft' needs 'synthesize', which makes its input"):
        tiny(tmp_path, 'stages=["sft"]')
    own = [f'sft.data="{tmp_path}/a.jsonl"', f'reward_model.data="{tmp_path}/b.jsonl"']
    config = tiny(tmp_path, 'stages=["sft", "reward-model"]', *own)
    assert supervised.input_of("sft", config) == tmp_path / "a.jsonl"
    assert supervised.input_of("reward-model", config) == tmp_path / "b.jsonl"
    records = [preference_record(f"What is {i // 2} times 3?", CLEAN, POOR, "") for i in range(200)]  # no task_id
    write_jsonl(tmp_path / "b.jsonl", records)
    found = pairs.load_pairs(
        tmp_path / "b.jsonl", tokenizer, margin=0.0, mask_results=True, held_out=0.2, max_tokens=10_000
    )
    assert len(found.train) + len(found.held_out) == 200
    assert 20 <= len(found.held_out) <= 60  # 40 expected
    assert all(len(group) % 2 == 0 for group in (found.train, found.held_out))  # both pairs of a question on one side


def test_whether_a_question_is_held_out_depends_on_nothing_else() -> None:
    assert [pairs.is_held_out(str(i), 0.3) for i in range(50)] == [pairs.is_held_out(str(i), 0.3) for i in range(50)]
    share = np.mean([pairs.is_held_out(str(i), 0.3) for i in range(2000)])
    assert 0.25 < share < 0.35
