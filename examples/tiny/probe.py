"""What a checkpoint can do on unseen word problems: samples answers with a stand-in for the tool that does sums only."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trajectory.chat import encode, render_prompt
from trajectory.markup import STOP_STRINGS, final_answer, render_result, trailing_tool_call
from trajectory.word_problems import problems

MAX_TOOL_CALLS = 3
MAX_NEW_TOKENS = 160  # of one engine call

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Shares are of trajectories, sampled at temperature 1."""

    accuracy: float
    tool_rate: float  # called the tool at least once
    mean_tokens: float  # of the model's own
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} right, {self.tool_rate:.1%} call the tool, {self.mean_tokens:.1f} tokens"


def run_sum(code: str) -> str:
    """What `print(<integers, +, -, *, parentheses>)` prints. Anything else is an error, as code is never executed here."""
    try:
        (line,) = re.findall(r"\s*print\((.*)\)\s*", code, re.DOTALL)
        return f"{_value(ast.parse(line, mode='eval').body)}\n"
    except (ValueError, SyntaxError):
        return "SyntaxError: invalid syntax\n"


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
    raise ValueError(f"not a sum: {ast.unparse(node)}")


@torch.no_grad()
def probe(path: Path, num: int, *, opening: str = "", seed: int = 0) -> Figures:
    """Sample one answer to each of `num` problems of the evaluation split; each response begins with `opening`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    stop = [*(tokenizer.convert_tokens_to_ids(tag) for tag in STOP_STRINGS), tokenizer.eos_token_id]

    asked = list(islice(problems("eval", seed), num))
    prompts = [render_prompt(tokenizer, problem.question, system_prompt="") for problem in asked]
    responses = [encode(tokenizer, opening) for _ in asked]
    num_sampled, num_calls = [len(response) for response in responses], [0] * num
    live = list(range(num))
    while live:
        inputs = tokenizer.pad({"input_ids": [prompts[i] + responses[i] for i in live]}, return_tensors="pt")
        outputs = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=stop,
        )
        waiting = []
        for i, row in zip(live, outputs[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in stop), len(row) - 1)
            responses[i] += row[: end + 1]
            num_sampled[i] += end + 1
            call = trailing_tool_call(tokenizer.decode(responses[i]))
            if call is not None and num_calls[i] < MAX_TOOL_CALLS:
                num_calls[i] += 1
                responses[i] += encode(tokenizer, render_result(run_sum(call.content), max_chars=1000))
                waiting.append(i)
        live = waiting

    texts = tuple(tokenizer.decode(response) for response in responses)
    right = [final_answer(text) == str(problem.answer) for text, problem in zip(texts, asked, strict=True)]
    return Figures(
        accuracy=sum(right) / num,
        tool_rate=sum(n > 0 for n in num_calls) / num,
        mean_tokens=sum(num_sampled) / num,
        texts=texts,
    )
