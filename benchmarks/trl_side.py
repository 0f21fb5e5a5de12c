"""TRL's `GRPOTrainer` on the workload of `benchmarks.vs_trl`, in a process of its own.

    python -m benchmarks.trl_side {none,tools,rollout_func} [--threads 2] [--steps 4]

- `none`: no tools; completions end where our episodes do: each stop string is one token of the tiny model.
- `tools`: the documented way, `GRPOTrainer(tools=[...])`, with an async tool. TRL 1.16 gathers the async calls of *one
  completion* only and waits for them before it looks at the next completion, so the latencies of a batch add up
  (`_tool_call_loop`); with one call a turn, sync tools wait just as long.
- `rollout_func`: what an expert can write against the hook that TRL calls experimental: generate for all, run the calls of
  all trajectories at once, generate again for those that called. The batch waits for its slowest call in every turn.

TRL's settings: float32, micro-batches that fit the cache, no gradient checkpointing, no logprob pass for old or reference
policies, no saving, the better of one and two threads. Sampling is transformers' `generate` on a padded batch, which ends
with its longest completion. Other samplers were tried on a CPU: `use_transformers_continuous_batching` is several times
slower; `use_vllm` (colocate; vLLM 0.32 is newer than TRL supports) fails at its first weight sync, because vLLM has packed
its linear layers and dropped their loaders ("'Parameter' object has no attribute 'weight_loader'").
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import operator
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.tool_latency import draw
from benchmarks.vs_trl import GROUP_SIZE, LR, MAX_TOOL_CALLS, MODEL, TRAJECTORIES_PER_STEP, WAYS, Measured, run_config
from rewards import outcome
from tasks.load import load_tasks
from trajectory.markup import final_answer, render_result, stop_strings, trailing_tool_call
from trajectory.types import Task, ToolCall

MICRO_BATCH = 32  # trajectories; 16 and 128 were slower
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}{{ '\n<result>\n' + message.content + '\n</result>\n' }}"
    "{%- else -%}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{ '<code>' + call.function.name + call.function.arguments|tojson + '</code>' }}{%- endfor -%}"
    "{{ '<|im_end|>' }}{%- if not message.tool_calls -%}{{ '\n' }}{%- endif -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""The tiny model's own, with results inside the assistant's message. TRL appends what follows the last `<|im_end|>` of a
dummy call, so the tokens it trains on are the ones of our episodes: `…</code>\\n<result>\\n1023\\n</result>\\n…`."""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|im_start|>assistant\n", "</result>\n"],
    "fields": {
        "tool_calls": {
            "open": "<code>",
            "close": "</code>",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "python", "arguments": {"code": "{content}"}}},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}
"""How TRL finds a call in a completion; parsing starts after the last anchor, so an earlier call isn't run again."""

OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def evaluate(code: str) -> str:
    """What `print(631+98*4)` prints. TRL runs tools in the trainer's process, so nothing but integer sums is run."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError(ast.dump(node))

    try:
        match ast.parse(code.strip()).body:
            case [ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=[expression]))]:
                return str(value(expression))
        return "[error]\nunsupported"
    except (SyntaxError, ValueError) as error:
        return f"[error]\n{error}"[:100]


class Tool:
    """The python tool with the injected latency."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.num_calls = 0

    async def python(self, code: str) -> str:
        """
        Run Python code and return what it printed.

        Args:
            code: The code to run.
        """
        self.num_calls += 1
        await asyncio.sleep(draw(self._rng))
        return evaluate(code)


def gathered_rollout(tool: Tool, max_tokens: int) -> Callable[[list[Any], GRPOTrainer], dict[str, Any]]:
    """A `rollout_func` that runs the tool calls of the whole batch at the same time."""

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        prompt_ids = trainer._tokenize_prompts(prompts)[0]
        completion_ids: list[list[int]] = [[] for _ in prompts]
        env_mask: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for turn in range(MAX_TOOL_CALLS + 1):
            inputs = [prompt_ids[i] + completion_ids[i] for i in active]
            sampled, _ = trainer._generate_single_turn(inputs, None, {}, GROUP_SIZE)
            calls: dict[int, ToolCall] = {}
            for i, token_ids in zip(active, sampled, strict=True):
                token_ids = token_ids[: max_tokens - len(completion_ids[i])]
                completion_ids[i] += token_ids
                env_mask[i] += [1] * len(token_ids)
                if call := trailing_tool_call(tokenizer.decode(token_ids)):
                    calls[i] = call
            if not calls or turn == MAX_TOOL_CALLS:
                break

            async def run_all(contents: list[str]) -> list[str]:
                return await asyncio.gather(*(tool.python(content) for content in contents))

            outputs = asyncio.run(run_all([call.content for call in calls.values()]))
            active = []
            for i, output in zip(calls, outputs, strict=True):
                result_ids = tokenizer.encode(render_result(output, 200), add_special_tokens=False)
                if len(completion_ids[i]) + len(result_ids) < max_tokens:
                    completion_ids[i] += result_ids
                    env_mask[i] += [0] * len(result_ids)
                    active.append(i)
            if not active:
                break
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None, "env_mask": env_mask}

    return rollout


class Clock(TrainerCallback):
    """Records when each optimizer step ended, and the mean number of tokens that the model wrote."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.tokens_per_trajectory: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "completions/mean_length" in logs:
            self.tokens_per_trajectory.append(float(logs["completions/mean_length"]))


def reward(completions: list[Any], golds: list[list[str]], **_: Any) -> list[float]:
    """Our outcome reward, and a draw that gives every group variance, so that both sides train on every trajectory."""
    rewards = []
    for messages, gold in zip(completions, golds, strict=True):
        text = "".join(message["content"] for message in messages if message["role"] == "assistant")
        task = Task(id="", question="", golds=tuple(gold))
        rewards.append(outcome.score_answer(final_answer(text), task, 3.0).value + random.random() / 100)
    return rewards


def measure(way: str, *, steps: int, warmup: int, threads: int) -> Measured:
    """Trains `warmup + steps` steps and times the last `steps`."""
    torch.set_num_threads(threads)
    config = run_config(way)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    stops = [tokenizer.convert_tokens_to_ids(stop) for stop in stop_strings()]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *stops]
    tasks = load_tasks(config.data)
    tool, clock = Tool(config.seed), Clock()
    max_tokens = config.episode.max_response_tokens
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": t.question}], "golds": list(t.golds)} for t in tasks]
        ),
        tools=[tool.python] if way == "tools" else None,
        rollout_func=gathered_rollout(tool, max_tokens) if way == "rollout_func" else None,
        callbacks=[clock],
        args=GRPOConfig(
            output_dir="runs/bench/trl",
            max_steps=warmup + steps,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=TRAJECTORIES_PER_STEP // MICRO_BATCH,
            num_generations=GROUP_SIZE,
            max_completion_length=max_tokens,
            max_tool_calling_iterations=MAX_TOOL_CALLS,
            temperature=config.episode.temperature,
            learning_rate=LR,
            lr_scheduler_type="constant",
            epsilon=0.2,
            epsilon_high=0.28,
            beta=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            seed=config.seed,
        ),
    )
    trainer.train()
    return Measured(
        system="TRL 1.16",
        way=way,
        threads=threads,
        step_seconds=[b - a for a, b in zip(clock.ended[warmup - 1 :], clock.ended[warmup:], strict=False)],
        tokens_per_trajectory=sum(clock.tokens_per_trajectory[warmup:]) / steps,
        tool_calls_per_trajectory=tool.num_calls / ((warmup + steps) * TRAJECTORIES_PER_STEP),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=None, help="file for the figures, JSON")
    args = parser.parse_args()
    measure(args.way, steps=args.steps, warmup=args.warmup, threads=args.threads).report(args.out)


if __name__ == "__main__":
    main()
