"""The committed tiny base: small, loadable, and what vLLM, the learner and the trajectory grammar need of a model."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from examples.tiny import recipe
from examples.tiny.probe import run_sum
from trajectory.chat import check_append_only, encode, render_prompt
from trajectory.markup import STOP_STRINGS, final_answer, render_result, trailing_tool_call, validate
from trajectory.word_problems import generate

BASE = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "base"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE)


def test_it_stays_small_enough_for_a_repository() -> None:
    assert sum(path.stat().st_size for path in BASE.rglob("*")) <= 3_000_000


def test_it_is_an_untied_bfloat16_qwen3() -> None:
    config = AutoConfig.from_pretrained(BASE)
    assert config.model_type == "qwen3"
    assert config.tie_word_embeddings is False
    assert config.dtype == torch.bfloat16


def test_the_vocabulary_has_a_row_for_each_token_and_no_other(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A sampled padding id crashes vLLM's detokeniser when logprobs are asked for."""
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == model.get_output_embeddings().weight.shape[0] == len(tokenizer) == model.config.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(rows))


def test_ends_of_text_agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token is None


@pytest.mark.parametrize("tag", recipe.TAGS)
def test_each_tag_is_one_token_that_stays_in_the_text(tag: str, tokenizer: PreTrainedTokenizerFast) -> None:
    (token,) = encode(tokenizer, tag)
    assert tokenizer.decode([token], skip_special_tokens=True) == tag


def test_the_tags_are_all_of_the_grammar() -> None:
    assert set(STOP_STRINGS) | {"<think>", "<result>"} < set(recipe.TAGS)
    assert len(recipe.TAGS) == 10


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "631+98*4")) == list("631+98*4")


@pytest.mark.parametrize(
    "text", ["Traceback (most recent call last):\n\n  x = [1]\n", "naïve 中文 🙂\t\\boxed{\u00a0}", "< /result>"]
)
def test_any_text_survives_a_round_trip(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """A tool's output may hold any bytes."""
    assert tokenizer.decode(encode(tokenizer, text)) == text


@pytest.mark.parametrize("system_prompt", ["", "Use the tools."])
def test_the_chat_template_is_append_only(system_prompt: str, tokenizer: PreTrainedTokenizerFast) -> None:
    check_append_only(tokenizer, system_prompt)
    prompt = render_prompt(tokenizer, "What is 2 times 3?", "")
    assert tokenizer.decode(prompt) == "<|im_start|>user\nWhat is 2 times 3?<|im_end|>\n<|im_start|>assistant\n"


def test_the_recipe_still_makes_this_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Whoever edits the templates, the mix or `render_result` must make the base anew (examples/tiny/make_base.py)."""
    assert recipe.build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_mix_is_well_formed_and_right_where_it_should_be() -> None:
    for way, right in (("clean", True), ("rambling", True), ("toolless", False), ("wrong", False)):
        for problem, pieces in islice(recipe.examples(seed=3, way=way), 300):
            text = "".join(piece.text for piece in pieces)
            assert validate(text) == ()
            assert (final_answer(text) == str(problem.answer)) is right
            assert [piece.by_model for piece in pieces] == ([True] if way == "toolless" else [True, False, True])


@torch.no_grad()
def test_it_copies_the_numbers_into_the_code(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """One greedy problem end to end: a plan, the right expression, and the tool's result as the answer."""
    prompt = render_prompt(
        tokenizer, "Leo has 631 stamps and buys 98 bags of 4 stamps each. How many stamps does Leo have now?", ""
    )
    stop = [tokenizer.convert_tokens_to_ids(tag) for tag in STOP_STRINGS]

    def continue_(ids: list[int]) -> list[int]:
        output = model.generate(torch.tensor([ids]), max_new_tokens=80, do_sample=False, eos_token_id=stop)
        return output[0].tolist()

    first = continue_(prompt + encode(tokenizer, "<think>Plan:"))
    call = trailing_tool_call(tokenizer.decode(first[len(prompt) :]))
    assert call is not None
    assert call.content == "print(631+98*4)"
    second = continue_(first + encode(tokenizer, render_result("1023\n", max_chars=1000)))
    text = tokenizer.decode(second[len(prompt) :])
    assert validate(text) == ()
    assert final_answer(text) == "1023"


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("\nprint(631+98*4)\n", "1023\n"),
        ("print((318-936)*33)", "-20394\n"),
        ("print(__import__('os').getcwd())", "SyntaxError: invalid syntax\n"),
        ("print(9**9**9)", "SyntaxError: invalid syntax\n"),
        ("print(98*4", "SyntaxError: invalid syntax\n"),
    ],
)
def test_the_probes_tool_does_sums_and_nothing_else(code: str, printed: str) -> None:
    assert run_sum(code) == printed


def test_the_base_is_free_of_evaluation_problems() -> None:
    """The imitated problems come from the train split alone."""
    imitated = {problem.key for problem, _ in islice(recipe.examples(seed=0), 3000)}
    assert len(imitated) == 3000
    evaluation = {task.question for task in generate("eval", 2000)}
    assert not {problem.question for problem, _ in islice(recipe.examples(seed=0), 3000)} & evaluation
