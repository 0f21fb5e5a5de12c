"""The committed tiny base: small, loadable, and what vLLM, the learner and the trajectory grammar need of a model."""

import tomllib
from itertools import islice
from pathlib import Path
from random import Random
from typing import get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from examples.tiny import recipe, ways
from examples.tiny.probe import run_sum, run_tool
from rewards import dimensions
from tasks.word_problems.problems import generate
from tasks.word_problems.types import Tier
from trajectory.chat import check_append_only, encode, render_prompt
from trajectory.markup import final_answer, render_result, stop_strings, trailing_tool_call, validate
from trajectory.types import ToolCall

pytestmark = pytest.mark.slow

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
    assert set(stop_strings()) | {"<think>", "<result>"} < set(recipe.TAGS)
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


@pytest.mark.parametrize("way", get_args(ways.Way))
def test_the_ways_are_well_formed_and_right_where_they_should_be(way: ways.Way) -> None:
    for problem, pieces in islice(recipe.trajectories(seed=3, way=way), 600):
        text = ways.text_of(pieces)
        assert validate(text) == ()
        assert (final_answer(text) == str(problem.answer)) is (way in ("clean", "rambling", "repeated")), text
        assert text.startswith(ways.PLAN_OPENING) is (way == "clean")
        assert [piece.by_model for piece in pieces] == [i % 2 == 0 for i in range(len(pieces))]
        assert len(pieces) // 2 <= 3  # tool calls that an episode allows


def test_a_clean_way_is_kept_and_a_poor_one_is_repaired() -> None:
    """By the paper's score and thresholds: what stage 1 sorts is there to be sorted."""
    for way, low, high in (("clean", 0.9, 1.0), ("rambling", 0.0, 0.6), ("repeated", 0.0, 0.9)):
        for problem, pieces in islice(recipe.trajectories(seed=3, way=way), 300):
            ideal = len(ways.text_of(ways.WAYS["clean"](problem, Random(0))).split())
            text = ways.text_of(pieces)
            length = dimensions.length(len(text.split()), ideal)
            score = 0.4 * dimensions.confidence(text) + 0.3 * length + 0.3 * dimensions.repetition(text.split())
            assert low <= score <= high, text


def test_repairs_show_the_bad_trajectory_and_are_mostly_clean() -> None:
    num_clean = 0
    for problem, example in islice(recipe.repairs(seed=3), 400):
        kind, question, *rest = example.prompt.replace("\n", "\0", 1).replace(". ", "\0", 1).split("\0")
        assert kind in ("Improve", "Fix")
        assert question == problem.question
        bad, _, problems = rest[0].rpartition("\n")
        assert "think>" in bad
        assert set(problems.split(", ")) <= set(recipe.PROBLEMS)
        assert ("wrong answer" in problems) is (kind == "Fix")
        repaired = ways.text_of(example.pieces)
        num_clean += final_answer(repaired) == str(problem.answer) and repaired.startswith(ways.PLAN_OPENING)
    assert 0.75 < num_clean / 400 < 0.95


def test_the_demo_asks_the_repairer_as_it_was_taught() -> None:
    repair = tomllib.loads((BASE.parent / "run.toml").read_text())["repair"]
    assert (repair["right_prompt"], repair["wrong_prompt"]) == (recipe.RIGHT_PROMPT, recipe.WRONG_PROMPT)


LEO = (
    "Leo fills 631 boxes with 98 stamps each. Eva has 3 times as many stamps, less 120. How many stamps does Eva have?"
)
MIA = "Mia buys a blue lamp from Oslo for each of 250 friends and pays 300 dollars for the trip. "
BAGS = "Leo has 631 stamps and buys 98 bags of 4 stamps each. How many stamps does Leo have now?"
BAD = "<think>Just add the first two numbers.</think>\n<code>\nprint(631+98)\n</code>\n<result>\n729\n</result>\n"


@pytest.mark.parametrize(
    ("asked", "opening", "calls", "answer"),
    [
        (BAGS, ways.PLAN_OPENING, ["print(631+98*4)"], "1023"),
        (LEO, ways.PLAN_OPENING, ["print(631*98)", "print(61838*3-120)"], "185394"),
        (
            MIA + "How many dollars does Mia pay?",
            ways.PLAN_OPENING,
            ["a blue lamp from Oslo", "print(31*250+300)"],
            "8050",
        ),
        (
            recipe.WRONG_PROMPT.format(
                question=BAGS, trajectory=f"{BAD}<answer>\\boxed{{729}}</answer>", problems="wrong answer"
            ),
            "",
            ["print(631+98*4)"],
            "1023",
        ),
    ],
    ids=["one call", "two calls", "a lookup", "a repair"],
)
@torch.no_grad()
def test_it_works_with_its_tools(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: str, opening: str, calls: list[str], answer: str
) -> None:
    """Greedy, end to end: the numbers are copied into the code, and the tools' results into the next call."""
    prompt = render_prompt(tokenizer, asked, "")
    stop = [*(tokenizer.convert_tokens_to_ids(tag) for tag in stop_strings()), tokenizer.eos_token_id]
    ids, made = prompt + encode(tokenizer, opening), []
    for _ in range(3):
        output = model.generate(torch.tensor([ids]), max_new_tokens=80, do_sample=False, eos_token_id=stop)
        ids = output[0].tolist()
        call = trailing_tool_call(tokenizer.decode(ids[len(prompt) :]))
        if call is None:
            break
        made.append(call.content)
        ids += encode(tokenizer, render_result(run_tool(call), max_chars=1000))
    text = tokenizer.decode(ids[len(prompt) :]).removesuffix(tokenizer.eos_token)
    assert made == calls
    assert validate(text) == ()
    assert final_answer(text) == answer


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


def test_the_probes_search_finds_what_is_asked_for() -> None:
    found = run_tool(ToolCall(tool="search", content="a blue lamp from Oslo"))
    assert found.splitlines()[0] == "[blue-lamp-oslo] A blue lamp from Oslo costs 31 dollars."


def test_the_base_is_free_of_evaluation_problems() -> None:
    """The imitated problems come from the train split alone."""
    told = [problem for problem, _ in islice(recipe.trajectories(seed=0), 3000)]
    told += [problem for problem, _ in islice(recipe.repairs(seed=0), 1000)]
    assert all(problem.split == "train" for problem in told)
    evaluation = {task.question for task in generate("eval", 3000, tiers=dict.fromkeys(get_args(Tier), 1.0))}
    assert not {problem.question for problem in told} & evaluation
