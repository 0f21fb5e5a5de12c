"""Chat templates as models have them."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# As Qwen3's: of an assistant's message it keeps the thought before the first `</think>` and what stands behind the last.
KEEPS_ENDS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}",
)
# As that of DeepSeek-R1's distillations and of Qwen3's thinking models: the prompt opens the thought.
OPENS_THINK = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
