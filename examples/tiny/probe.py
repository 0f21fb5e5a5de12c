"""Measures a checkpoint on unseen word problems, as policy and as repairer, with simple replacements for the tools:

python -m examples.tiny.probe examples/tiny/base --num 200

The tool `python` only does sums, and `search` counts shared words. On these calls the sandbox and BM25 answer the same.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny import recipe, ways
from tasks.word_problems.corpus import corpus
from tasks.word_problems.problems import problems
from tasks.word_problems.types import Tier, WordProblem, evaluate
from tool_sandbox.search.tool import render_documents
from trajectory.chat import encode, render_prompt
from trajectory.markup import final_answer, render_result, stop_strings, trailing_tool_call, validate
from trajectory.types import ToolCall

MAX_TOOL_CALLS = 3
MAX_NEW_TOKENS = 160  # of one engine call
BATCH_SIZE = 256

_HEDGING = re.compile(r"\b(maybe|unsure|perhaps|probably|might|recheck)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One sampled trajectory."""

    problem: WordProblem
    text: str
    num_calls: int
    num_tokens: int  # of the model's own

    @property
    def right(self) -> bool:
        return final_answer(self.text) == str(self.problem.answer)

    @property
    def clean(self) -> bool:
        return self.right and self.text.startswith(ways.PLAN_OPENING) and not _HEDGING.search(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Shares of trajectories that were sampled at temperature 1."""

    num: int
    accuracy: float
    clean: float  # right, by a plan
    tool_rate: float  # called a tool at least once
    mean_tokens: float

    @classmethod
    def of(cls, answered: Sequence[Answered]) -> Figures:
        num = max(len(answered), 1)
        return cls(
            num=len(answered),
            accuracy=sum(a.right for a in answered) / num,
            clean=sum(a.clean for a in answered) / num,
            tool_rate=sum(a.num_calls > 0 for a in answered) / num,
            mean_tokens=sum(a.num_tokens for a in answered) / num,
        )

    def __str__(self) -> str:
        return (
            f"{self.accuracy:6.1%} right, {self.clean:6.1%} right and clean, {self.tool_rate:6.1%} call a tool, "
            f"{self.mean_tokens:5.1f} tokens ({self.num})"
        )


def run_tool(call: ToolCall) -> str:
    """A tool's answer: the sums in `print(…)`, or the documents that share most words with the query."""
    if call.tool == "search":
        words = set(call.content.lower().split())
        best = sorted(corpus(), key=lambda document: -len(words & set(document["id"].split("-"))))
        return render_documents(best[: ways.NUM_RESULTS], 200, 1000)
    return run_sum(call.content)


def run_sum(code: str) -> str:
    """The output of `print(<integers, +, -, *, parentheses>)`. Other code is an error, as no code is executed here."""
    try:
        (line,) = re.findall(r"\s*print\((.*)\)\s*", code, re.DOTALL)
        return f"{evaluate(line)}\n"
    except (ValueError, SyntaxError):
        return "SyntaxError: invalid syntax\n"


class Probe:
    """A loaded checkpoint."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._stop = [
            *(self._tokenizer.convert_tokens_to_ids(tag) for tag in stop_strings()),
            self._tokenizer.eos_token_id,
        ]

    def answer(self, asked: Sequence[tuple[WordProblem, str]], opening: str = "") -> list[Answered]:
        """One sampled trajectory for each user message about a problem; each response begins with `opening`."""
        answered: list[Answered] = []
        for start in range(0, len(asked), BATCH_SIZE):
            answered += self._batch(asked[start : start + BATCH_SIZE], opening)
        return answered

    @torch.no_grad()
    def _batch(self, asked: Sequence[tuple[WordProblem, str]], opening: str) -> list[Answered]:
        tokenizer = self._tokenizer
        prompts = [render_prompt(tokenizer, message, system_prompt="") for _, message in asked]
        responses = [encode(tokenizer, opening) for _ in asked]
        num_sampled, num_calls = [len(response) for response in responses], [0] * len(asked)
        live = list(range(len(asked)))
        while live:
            inputs = tokenizer.pad({"input_ids": [prompts[i] + responses[i] for i in live]}, return_tensors="pt")
            outputs = self._model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=self._stop,
            )
            waiting = []
            for i, row in zip(live, outputs[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in self._stop), len(row) - 1)
                responses[i] += row[: end + 1]
                num_sampled[i] += end + 1
                call = trailing_tool_call(tokenizer.decode(responses[i]))
                if call is not None and num_calls[i] < MAX_TOOL_CALLS:
                    num_calls[i] += 1
                    responses[i] += encode(tokenizer, render_result(run_tool(call), max_chars=1000))
                    waiting.append(i)
            live = waiting
        return [
            Answered(problem=problem, text=tokenizer.decode(ids), num_calls=calls, num_tokens=tokens)
            for (problem, _), ids, calls, tokens in zip(asked, responses, num_calls, num_sampled, strict=True)
        ]


def repair_prompt(bad: Answered) -> str:
    """The repairer's prompt for a trajectory of the policy. A simple rule finds the problems that it names."""
    if bad.right:
        named = ["low confidence"] if _HEDGING.search(bad.text) else ["low repetition"]
        template, named = recipe.RIGHT_PROMPT, [*named, "low length"]
    else:
        template, named = recipe.WRONG_PROMPT, ["wrong answer", *validate(bad.text)]
    text = bad.text.removesuffix("<|im_end|>")
    return template.format(question=bad.problem.question, trajectory=text, problems=", ".join(named))


def report(path: Path, num: int, seed: int = 0) -> str:
    """The figures of each tier, from `num` problems of its evaluation split."""
    torch.manual_seed(seed)
    probe, lines = Probe(path), []
    every: list[Answered] = []
    for tier in get_args(Tier):
        asked = [(problem, problem.question) for problem in islice(problems("eval", seed, tier), num)]
        answered = probe.answer(asked)
        every += answered
        planned = probe.answer(asked, ways.PLAN_OPENING)
        lines += [f"{tier:12} policy      {Figures.of(answered)}", f"{tier:12} with a plan {Figures.of(planned)}"]
        for name, bad in (
            ("poor path", [a for a in answered if a.right and not a.clean]),
            ("wrong", [a for a in answered if not a.right]),
        ):
            repaired = probe.answer([(a.problem, repair_prompt(a)) for a in bad])
            lines.append(f"{tier:12} {name:11} {Figures.of(repaired)}")
    return "\n".join([*lines, f"{'all':12} policy      {Figures.of(every)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of the checkpoint")
    parser.add_argument("--num", type=int, default=200, help="problems of each tier")
    args = parser.parse_args()
    print(report(args.path, args.num))


if __name__ == "__main__":
    main()
