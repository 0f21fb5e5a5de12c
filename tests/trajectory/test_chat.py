"""Chat templates: what a prompt looks like, and which templates an episode can't be appended to."""

import pytest
from chat_templates import CHATML, KEEPS_ENDS, OPENS_THINK
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actors.config import EpisodeConfig
from trajectory import chat
from trajectory.markup import render_result, stop_strings, validate
from trajectory.records import check_results, split_response


@pytest.fixture(scope="module")
def base_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the answer is five", ":<:<:<:<"], trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return tokenizer


@pytest.fixture
def make_tokenizer(base_tokenizer):
    def make(template):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=base_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


def test_prompt_holds_system_and_question(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    ids = chat.render_prompt(tokenizer, "What is 2 + 3?", "Be brief.")
    assert all(isinstance(i, int) for i in ids)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_empty_system_prompt_sends_no_system_message(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    assert "system" not in tokenizer.decode(chat.render_prompt(tokenizer, "Hi", ""))


TODAYS_PROMPT = r"""Solve the question step by step. You can run tools while you reason. Use these tags, never nested:
- <think>your reasoning</think> before each tool call and before the answer.
- <code>Python code</code> to run Python (numpy, scipy and sympy are installed). Print what you need to see.
- <search>a query</search> to look something up.
- <result>what the tool returned</result>: written by the environment after each </code> or </search>, never by you.
- <answer>a short conclusion with the final answer in \boxed{}</answer> once, at the end.
Use at most three tool calls.
Example:
<think>I need 17 times 23.</think>
<code>
print(17 * 23)
</code>
<result>
391
</result>
<think>So it is 391.</think>
<answer>The product is \boxed{391}.</answer>"""


def test_the_default_prompt_is_the_one_that_models_were_trained_on():
    """Checkpoints, and the embedded base model, know this prompt and stop there: a change of either is a new model."""
    assert chat.default_system_prompt() == TODAYS_PROMPT
    assert EpisodeConfig().system_prompt == TODAYS_PROMPT
    assert stop_strings() == ("</code>", "</search>", "</answer>")


def test_the_default_prompt_names_every_tag():
    for tag in ("think", "code", "search", "result", "answer"):
        assert f"<{tag}>" in chat.default_system_prompt()
        assert f"</{tag}>" in chat.default_system_prompt()
    assert "\\boxed{" in chat.default_system_prompt()


def test_chatml_is_append_only(make_tokenizer):
    chat.check_append_only(make_tokenizer(CHATML), chat.default_system_prompt())


def test_a_template_that_drops_tool_calls_from_a_reply_is_refused(make_tokenizer):
    with pytest.raises(ValueError, match=r"not append-only: it changes the reply at character .*<code>"):
        chat.check_append_only(make_tokenizer(KEEPS_ENDS), chat.default_system_prompt())


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (CHATML, ""),
        (KEEPS_ENDS, ""),
        (OPENS_THINK, "<think>\n"),
        (OPENS_THINK.replace("<think>\n", "<think>"), "<think>"),
        (OPENS_THINK.replace("<think>\n", "<think>\n\n</think>\n\n"), ""),  # as without thinking: closed at once
    ],
)
def test_what_the_prompt_has_already_of_the_reply(make_tokenizer, template, opening):
    tokenizer = make_tokenizer(template)
    for system_prompt in (chat.default_system_prompt(), "", "Write <think> first."):
        assert chat.prompt_opening(tokenizer, system_prompt) == opening
    chat.check_template(tokenizer, chat.default_system_prompt())


def test_a_reply_behind_an_opening():
    assert chat.without_opening("<think>\nAdd.</think>", "<think>\n") == "Add.</think>"
    assert chat.without_opening("<think>Add.</think>", "<think>\n") == "Add.</think>"
    assert chat.without_opening("\n<think>\n\nAdd.</think>", "<think>") == "Add.</think>"
    assert chat.without_opening("Add.</think>", "<think>\n") == "Add.</think>"
    assert chat.without_opening("<think>\nAdd.</think>", "") == "<think>\nAdd.</think>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML.replace("for m in messages", "for m in messages if m.role != 'system'"),
            "leaves out the system message",
        ),
        (CHATML.replace("for m in messages", "for m in messages if m.role != 'user'"), "leaves out the user's message"),
        (OPENS_THINK.replace("<think>", "<answer>"), "begins the reply with <answer>"),
        (None, r"set tokenizer\.chat_template"),
    ],
)
def test_a_template_with_which_no_episode_can_begin_is_refused(make_tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        chat.check_template(make_tokenizer(template), chat.default_system_prompt())


def test_the_prompts_example_is_in_the_grammar_that_records_are_read_by():
    example = chat.default_system_prompt().partition("Example:\n")[2]
    assert validate(example) == ()
    check_results(example)
    assert [piece for piece, by_model in split_response(example) if not by_model] == [render_result("391\n", 100)]


def test_a_template_that_strips_earlier_reasoning_is_refused(make_tokenizer):
    template = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    with pytest.raises(ValueError, match=r"not append-only: it changes the reply at character .*<think>"):
        chat.check_append_only(make_tokenizer(template), chat.default_system_prompt())


def test_a_template_whose_generation_prompt_differs_is_refused(make_tokenizer):
    template = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>{% endif %}"
    )
    with pytest.raises(ValueError, match="append-only"):
        chat.check_append_only(make_tokenizer(template), chat.default_system_prompt())
    template = CHATML.replace("<|im_start|>{{", "{{ loop.length }}<|im_start|>{{")
    with pytest.raises(ValueError, match="changes the prompt at character 0"):
        chat.check_append_only(make_tokenizer(template), chat.default_system_prompt())


def test_a_token_that_merges_across_the_boundary_is_refused(make_tokenizer):
    # The prompt ends with ":" and the reply begins with "<", which this tokenizer merges into one token.
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}:{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="tokenizer is not append-only"):
        chat.check_append_only(make_tokenizer(template), "")


def test_a_missing_template_or_role_is_explained(make_tokenizer):
    with pytest.raises(ValueError, match=r"set tokenizer\.chat_template"):
        chat.render_prompt(make_tokenizer(None), "Hi", chat.default_system_prompt())
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match=r'no system role.*system_prompt = ""'):
        chat.render_prompt(make_tokenizer(template), "Hi", chat.default_system_prompt())


def test_load_tokenizer(make_tokenizer, tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    loaded = chat.load_tokenizer(str(tmp_path))
    assert chat.render_prompt(loaded, "Hi", chat.default_system_prompt()) == chat.render_prompt(
        make_tokenizer(CHATML), "Hi", chat.default_system_prompt()
    )
