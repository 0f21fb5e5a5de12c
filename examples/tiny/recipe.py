"""The recipe of the tiny base: its tokenizer, its architecture, and the mix of examples that it imitates.

The trajectories (ways.py) make it a policy of medium quality: half of them lead to the right answer, some by a bad path. So
stage 1 has good and bad ones to sort, and GRPO can improve it. The repairs make it a repairer, too: given a bad trajectory
and its problems, it mostly writes a clean one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import get_args

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.tiny.ways import WAYS, Piece, Way, habits, text_of
from tasks.word_problems.problems import mixed
from tasks.word_problems.types import Tier, WordProblem, evaluate
from trajectory.markup import Rule, escape

TAGS = tuple(f"<{slash}{tag}>" for tag in ("think", "code", "search", "result", "answer") for slash in ("", "/"))
PAD, START, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_VOCAB_SIZE = 1024
"""An upper limit. Merging ends before it, when all words of the mix are tokens."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""ChatML. It changes no message, so the conversation begins with the prompt exactly."""

RIGHT_PROMPT = "Improve. {question}\n{trajectory}\n{problems}"
WRONG_PROMPT = "Fix. {question}\n{trajectory}\n{problems}"
"""The repairer's prompts, as in run.toml: one for a right answer by a poor path, one for a wrong answer. `{problems}` are
words of `PROBLEMS`, separated by commas."""

PROBLEMS = (
    "wrong answer",
    *(f"low {dimension}" for dimension in ("confidence", "length", "repetition", "tool_success", "grounding")),
    *get_args(Rule),
)

TIERS: dict[Tier, float] = {
    "easy": 0.3, "steps": 0.14, "distractors": 0.12, "units": 0.14, "chained": 0.16, "lookup": 0.14
}  # fmt: skip
"""Shares of the tiers in the mix."""

ALONE, REPAIR_SHARE = 0.35, 0.4
"""The first is the share of the examples before any repair comes, the second the share of repairs among the others."""

CLEAN_REPAIRS = 0.85
"""The share of the repairs that are clean. The others are no better than a new try."""


@dataclass(frozen=True, slots=True)
class Example:
    """A user message and the response to imitate."""

    prompt: str
    pieces: list[Piece]


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.9M parameters with untied embeddings."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),  # no spare rows: a sampled padding id crashes vLLM's detokeniser
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            initializer_range=0.08,  # about 1/√128; with the usual 0.02 the model learns to copy numbers half as fast
            use_sliding_window=False,
        )
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of single digits and the words of the mix; every tag of the grammar is one token.

    The tags are not special tokens: they must show in the detokenised text, where stop strings are looked for.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    told = [example for way in WAYS for example in islice(trajectories(seed=0, way=way), 1500)]
    texts = [text for problem, pieces in told for text in (problem.question, *_untagged(pieces))]
    texts += ["Improve. ", "Fix. ", *(f"\n{', '.join(PROBLEMS)}, {problem}" for problem in PROBLEMS)] * 1000
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user\n", "assistant\n", "system\n"] * 1000 + texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, START, EOS)])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _untagged(pieces: list[Piece]) -> list[str]:
    return [part for piece in pieces for part in re.split("|".join(TAGS), piece.text)]


def trajectories(seed: int, way: Way | None = None) -> Iterator[tuple[WordProblem, list[Piece]]]:
    """An endless run of training problems, each with a trajectory: of one `way`, or of the mix."""
    random = Random(f"tiny-base/{seed}")
    for problem in mixed("train", seed, TIERS):
        yield problem, WAYS[way or _draw(habits(problem), random)](problem, random)


def repairs(seed: int) -> Iterator[tuple[WordProblem, Example]]:
    """An endless run of training problems, each with a bad trajectory in the prompt and a repaired one to imitate."""
    random = Random(f"tiny-base/repairs/{seed}")
    for problem in mixed("train", seed + 1_000_000, TIERS):
        way = _draw({way: share for way, share in habits(problem).items() if way != "clean"}, random)
        bad, named = text_of(WAYS[way](problem, random)), list(_NAMED[way])
        if way in ("rambling", "repeated"):
            template, poor = RIGHT_PROMPT, way
        else:
            template, poor = WRONG_PROMPT, _draw({"wrong": 0.7, "toolless": 0.3}, random)
            named = ["wrong answer"]
            if random.random() < 0.2:  # numbers copied wrongly
                bad = text_of(WAYS["clean"](_garbled(problem, random), random))
        if random.random() < 0.1:  # cut short
            bad, template, named = (
                bad[: random.randrange(len(bad) // 2, len(bad))],
                WRONG_PROMPT,
                ["wrong answer", "no_answer"],
            )
            poor = "wrong"
        if random.random() < 0.3:  # as a prompt shows escaped tags
            bad = escape(bad)
        named += [word for word in PROBLEMS[1:] if word not in named and random.random() < 0.1]
        prompt = template.format(question=problem.question, trajectory=bad, problems=", ".join(named))
        way = "clean" if random.random() < CLEAN_REPAIRS else poor
        yield problem, Example(prompt, WAYS[way](problem, random))


_NAMED: dict[Way, tuple[str, ...]] = {
    "rambling": ("low confidence", "low length"),
    "repeated": ("low length", "low repetition"),
    "toolless": ("wrong answer",),
    "wrong": ("wrong answer",),
}


def examples(seed: int, num: int) -> Iterator[Example]:
    """`num` examples to imitate. Trajectories alone come first: the model learns what both need faster on short texts."""
    random = Random(f"tiny-base/mix/{seed}")
    told, repaired = trajectories(seed), repairs(seed)
    for done in range(num):
        if done > num * ALONE and random.random() < REPAIR_SHARE:
            yield next(repaired)[1]
        else:
            problem, pieces = next(told)
            yield Example(problem.question, pieces)


def _draw(shares: dict[Way, float], random: Random) -> Way:
    return random.choices(list(shares), weights=list(shares.values()))[0]


def _garbled(problem: WordProblem, random: Random) -> WordProblem:
    """The problem with one digit of its last sum changed, and the answer that follows from it."""
    *before, last = problem.calls
    at = random.choice([match.start() for match in re.finditer(r"[0-9]", last.content)])
    digit = random.choice([d for d in "123456789" if d != last.content[at]])
    content = last.content[:at] + digit + last.content[at + 1 :]
    output = str(evaluate(content))
    return replace(problem, answer=int(output), calls=(*before, replace(last, content=content, output=output)))
