"""Chat templates: what a prompt looks like, and which templates an episode can't be appended to."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trajectory import chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


def test_the_default_prompt_names_every_tag():
    for tag in ("think", "code", "search", "result", "answer"):
        assert f"<{tag}>" in chat.SYSTEM_PROMPT
        assert f"</{tag}>" in chat.SYSTEM_PROMPT
    assert "\\boxed{" in chat.SYSTEM_PROMPT


def test_chatml_is_append_only(make_tokenizer):
    chat.check_append_only(make_tokenizer(CHATML))


def test_a_template_that_strips_earlier_reasoning_is_refused(make_tokenizer):
    template = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    with pytest.raises(ValueError, match=r"not append-only: it changes the reply at character .*<think>"):
        chat.check_append_only(make_tokenizer(template))


def test_a_template_whose_generation_prompt_differs_is_refused(make_tokenizer):
    template = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>{% endif %}"
    )
    with pytest.raises(ValueError, match="append-only"):
        chat.check_append_only(make_tokenizer(template))
    template = CHATML.replace("<|im_start|>{{", "{{ loop.length }}<|im_start|>{{")
    with pytest.raises(ValueError, match="changes the prompt at character 0"):
        chat.check_append_only(make_tokenizer(template))


def test_a_token_that_merges_across_the_boundary_is_refused(make_tokenizer):
    # The prompt ends with ":" and the reply begins with "<", which this tokenizer merges into one token.
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}:{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="tokenizer is not append-only"):
        chat.check_append_only(make_tokenizer(template), "")


def test_a_missing_template_or_role_is_explained(make_tokenizer):
    with pytest.raises(ValueError, match=r"set tokenizer\.chat_template"):
        chat.render_prompt(make_tokenizer(None), "Hi")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match=r'no system role.*system_prompt = ""'):
        chat.render_prompt(make_tokenizer(template), "Hi")


def test_load_tokenizer(make_tokenizer, tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    loaded = chat.load_tokenizer(str(tmp_path))
    assert chat.render_prompt(loaded, "Hi") == chat.render_prompt(make_tokenizer(CHATML), "Hi")
