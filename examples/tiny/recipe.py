"""What the tiny base is made of: its tokenizer, its architecture, and the mix of trajectories that it imitates.

The mix is the base policy's character. A trajectory shows one of four ways of working, told apart by its first words. Six
in ten lead to the right answer, so that stage 1 has good and bad to sort and GRPO something to gain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trajectory.markup import render_result
from trajectory.word_problems import WordProblem, problems

TAGS = tuple(f"<{slash}{tag}>" for tag in ("think", "code", "search", "result", "answer") for slash in ("", "/"))
PAD, START, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_VOCAB_SIZE = 1024
"""A ceiling: merging ends at about 560 tokens, when all words of the mix are tokens."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""ChatML. It shows every message as it stands, so a prompt stays the beginning of the conversation that follows."""

Way = Literal["clean", "rambling", "toolless", "wrong"]
"""A plan and the right code; the right code after doubts, repeated; an answer from the head, which is a guess; code that
computes something else."""

MOSTLY_CAREFUL: dict[Way, float] = {"clean": 0.55, "rambling": 0.17, "toolless": 0.13, "wrong": 0.15}
HABITS: dict[str, dict[Way, float]] = {
    "*": {"clean": 0.25, "rambling": 0.12, "toolless": 0.45, "wrong": 0.18},
    "(+)*": {"clean": 0.25, "rambling": 0.15, "toolless": 0.12, "wrong": 0.48},
}
"""Shares of the ways by kind of expression; `MOSTLY_CAREFUL` for all others. What looks like one step is done in the head,
and what speaks of sums is added up: so the likeliest answer, too, is wrong on three of the eight stories."""

PLAN_OPENING = "<think>Plan:"
"""How the clean way, and no other, begins."""

PLANS = {
    "*": "multiply.",
    "+*": "multiply, then add.",
    "*+": "multiply, then add.",
    "*-": "multiply, then subtract.",
    "-*": "multiply, then subtract.",
    "(+)*": "add, then multiply.",
    "**": "multiply twice.",
}
DOUBTS = (
    "Maybe I multiply, or perhaps I add.",
    "Perhaps I should recheck, maybe not.",
    "I am unsure, it might be off.",
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a response that is tokenised by itself, as an episode does it."""

    text: str
    by_model: bool  # False for a tool's result, which carries no loss


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.9M parameters with untied embeddings: tied ones don't survive a weight reload in vLLM on CPU."""
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
            initializer_range=0.08,  # about 1/√128; with the usual 0.02 copying numbers is learned half as fast
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
    told = [example for way in WAYS for example in islice(examples(seed=0, way=way), 1000)]
    texts = [text for problem, pieces in told for text in (problem.question, *_texts(pieces))]
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


def _texts(pieces: list[Piece]) -> list[str]:
    return [part for piece in pieces for part in re.split("|".join(TAGS), piece.text)]


def examples(seed: int, way: Way | None = None) -> Iterator[tuple[WordProblem, list[Piece]]]:
    """An endless run of training problems, each with a trajectory: of one `way`, or of the mix."""
    random = Random(f"tiny-base/{seed}")
    for problem in problems("train", seed):
        shares = HABITS.get(_kind(problem), MOSTLY_CAREFUL)
        drawn = way or random.choices(list(shares), weights=list(shares.values()))[0]
        yield problem, WAYS[drawn](problem, random)


def _kind(problem: WordProblem) -> str:
    return re.sub(r"\d", "", problem.expression)


def _clean(problem: WordProblem, random: Random) -> list[Piece]:
    return _with_tool(
        f"Plan: {PLANS[_kind(problem)]}", problem.expression, problem.answer, "The code gives the answer."
    )


def _rambling(problem: WordProblem, random: Random) -> list[Piece]:
    doubts = " ".join(random.choice(DOUBTS) for _ in range(random.randint(2, 3)))
    return _with_tool(doubts, problem.expression, problem.answer, "It is probably that, maybe.")


def _toolless(problem: WordProblem, random: Random) -> list[Piece]:
    guess = re.findall(r"\d+", problem.expression)[0]  # not random digits: predicting those teaches nothing
    return [Piece(f"<think>I can do this in my head.</think>\n<answer>\\boxed{{{guess}}}</answer>", True)]


def _wrong(problem: WordProblem, random: Random) -> list[Piece]:
    numbers = re.findall(r"\d+", problem.expression)
    if random.random() < 0.5:
        thought, kept = "Just add all the numbers.", numbers
    else:
        thought, kept = "Just add the first two numbers.", numbers[:2]
    return _with_tool(thought, "+".join(kept), sum(map(int, kept)), "The code gives the answer.")


def _with_tool(thought: str, expression: str, output: int, conclusion: str) -> list[Piece]:
    return [
        Piece(f"<think>{thought}</think>\n<code>\nprint({expression})\n</code>", True),
        Piece(render_result(f"{output}\n", max_chars=1000), False),
        Piece(f"<think>{conclusion}</think>\n<answer>\\boxed{{{output}}}</answer>", True),
    ]


WAYS: dict[Way, Callable[[WordProblem, Random], list[Piece]]] = {
    "clean": _clean,
    "rambling": _rambling,
    "toolless": _toolless,
    "wrong": _wrong,
}
