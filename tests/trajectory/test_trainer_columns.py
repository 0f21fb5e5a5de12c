"""What other trainers make of the records under templates that rewrite replies: tokens as sampled, no loss on results."""

from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, KEEPS_ENDS, OPENS_THINK
from transformers import AutoModelForCausalLM, AutoTokenizer

from trajectory import records, trainer_columns
from trajectory.chat import encode, render_text
from trajectory.markup import render_result

BASE = Path(__file__).resolve().parents[2] / "examples/tiny/base"
QUESTION, SYSTEM = "What is 2 times 3?", "Use the tags."
CALL = "<think>\nPlan: multiply.</think>\n<code>\nprint(2*3)\n</code>"
RESULT = render_result("6\n", max_chars=100)
END = "<think>The code gives the answer.</think>\n<answer>\\boxed{6}</answer>"
RESPONSE = CALL + RESULT + END


def tokenizer_with(template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=[CHATML, KEEPS_ENDS, OPENS_THINK], ids=["chatml", "keeps_ends", "opens_think"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_with(request.param)


@pytest.mark.parametrize("response", [RESPONSE, CALL + "<result>6</result>" + END], ids=["as an episode", "inline"])
def test_ids_labels_and_turns_say_the_same(tokenizer: Any, response: str) -> None:
    record = trainer_columns.sft_columns(records.sft_record(QUESTION, response, SYSTEM, task_id="a"), tokenizer)
    prompt = render_text(tokenizer, record["messages"][:-1])
    # The whole text, with the thought that a template opens in it once.
    whole = prompt.removesuffix("<think>\n") + response + "<|im_end|>"
    assert tokenizer.decode(record["input_ids"]) == whole
    result = RESULT if response == RESPONSE else "<result>6</result>"
    learned = [i for i, label in zip(record["input_ids"], record["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == whole.removeprefix(prompt).replace(result, "")
    assert all(label in (-100, i) for i, label in zip(record["input_ids"], record["labels"], strict=True))
    assert [turn["role"] for turn in record["turns"]] == ["user", "assistant", "tool", "assistant"]
    assert "".join(turn["content"] for turn in record["turns"]) == whole
    # LLaMA-Factory encodes each turn by itself, and learns those of the assistant.
    pieces = [(encode(tokenizer, turn["content"]), turn["role"] == "assistant") for turn in record["turns"]]
    assert [i for ids, _ in pieces for i in ids] == record["input_ids"]
    assert [i if learned else -100 for ids, learned in pieces for i in ids] == record["labels"]


def test_our_own_training_sees_the_same_ids(tokenizer: Any) -> None:
    record = records.sft_record(QUESTION, RESPONSE, SYSTEM)
    encoded = records.encode_conversation(tokenizer, record["messages"], eos_id=tokenizer.eos_token_id)
    exported = trainer_columns.sft_columns(record, tokenizer)
    assert [*encoded.prompt_ids, *encoded.response_ids] == exported["input_ids"]


def test_preferences_are_text_that_no_template_touches(tokenizer: Any) -> None:
    from trl.data_utils import is_conversational

    record = records.preference_record(QUESTION, RESPONSE, END, SYSTEM, task_id="a")
    exported = trainer_columns.preference_columns(record, tokenizer)
    assert not is_conversational({name: exported[name] for name in ("prompt", "chosen", "rejected")})
    assert exported["prompt"] + exported["chosen"] == exported["prompt"].removesuffix("<think>\n") + RESPONSE
    # Read back, they give the ids that the record gave.
    for before, after in zip(records.preference_sides(record), records.preference_sides(exported), strict=True):
        a, b = (records.encode_conversation(tokenizer, messages) for messages in (before, after))
        assert a.response_ids.tolist() == b.response_ids.tolist()


def test_trl_trains_on_the_ids(tmp_path: Path) -> None:
    """Its own trainer, on a file as `synthesize` writes it, under a template that would drop the tool call."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_with(KEEPS_ENDS)
    made = records.sft_record(QUESTION, RESPONSE, SYSTEM, task_id="a", source="kept", quality=1.0)
    records.write_jsonl(tmp_path / "sft.jsonl", [trainer_columns.sft_columns(made, tokenizer)])
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(BASE),
        SFTConfig(
            output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=1
        ),
        train_dataset=load_dataset("json", data_files=str(tmp_path / "sft.jsonl"), split="train"),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert RESPONSE in tokenizer.decode(ids)
    assert tokenizer.decode([i for i in labels if i != -100]) == CALL + END + "<|im_end|>"


def test_llama_factory_is_told_the_fields_there_are() -> None:
    tokenizer = tokenizer_with(CHATML)
    info = trainer_columns.dataset_info()
    sft = trainer_columns.sft_columns(records.sft_record("q", RESPONSE, ""), tokenizer)
    pair = trainer_columns.preference_columns(records.preference_record("q", RESPONSE, END, ""), tokenizer)
    assert set(info["autotraj_sft"]["columns"].values()) <= set(sft)
    assert {turn["role"] for turn in sft["turns"]} <= set(info["autotraj_sft"]["tags"].values())
    assert set(info["autotraj_preferences"]["columns"].values()) <= set(pair)
    # Its alpaca converter compares two sides only where both are text.
    assert all(isinstance(pair[name], str) for name in ("prompt", "chosen", "rejected"))
