"""Runs the GRPO loop on this machine's GPU with a model of real size: sampling with tools, training, weight sync.

    python -m benchmarks.gpu_loop [--shape 0.6B|4B|8B] [--steps 6] [--full] [--set KEY=VALUE ...] [--out FILE.md]

Run it after `benchmarks.gpu_first`, once `make setup EXTRA=cuda` has succeeded. It needs no download: the model has the
sizes of a Qwen3 and computes what the embedded tiny model does (widened_model.py), so it really calls the tool and has
something to learn. Its vocabulary is small, so its logits cost less than those of the real model. It needs two GPUs: one
for the engine and one for the learner. `--full` trains and sends all weights instead of adapters. `--set` takes further
overrides, such as engine.gpu_memory_utilization=0.5.

Without a GPU it runs with a model of 5M parameters, which shows that the script works and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from autotraj.config.run import load
from autotraj.launch import run_session
from autotraj.loop.grpo import GRPOConfig
from benchmarks.widened_model import SHAPES, widen

SOURCE = "examples/tiny/base"
CONFIG = "examples/tiny/grpo.toml"


def settings(model: Path, run_dir: Path, *, full: bool, on_gpu: bool) -> list[str]:
    """What differs from the tiny model's own run."""
    dtype = "bfloat16" if on_gpu else "float32"
    changes = [
        f"model={model}",
        f"run_dir={run_dir}",
        f"engine.dtype={dtype}",
        f"learner.dtype={dtype}",
        "learner.zero_stage=2",
        "learner.gradient_checkpointing=true",
        f"learner.micro_batch_tokens={16384 if on_gpu else 4096}",
        f"grpo.groups_per_step={32 if on_gpu else 4}",
    ]
    if on_gpu:
        changes += ["engine.device=gpu", "learner.num_gpus_per_learner=1"]
    return [*changes, "learner.lr=1e-6"] if full else [*changes, "learner.lora.rank=16", "learner.lr=1e-4"]


@contextmanager
def highest_memory() -> Iterator[list[int]]:
    """The largest memory in use on each GPU, in MiB, as `nvidia-smi` says it, looked at twice a second."""
    highest: list[int] = []
    done = threading.Event()

    def look() -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not done.wait(0.5):
            used = [int(line) for line in subprocess.check_output(command, text=True, timeout=30).split()]
            highest[:] = [max(pair) for pair in zip(used, highest or used, strict=True)]

    thread = threading.Thread(target=look, daemon=True)
    if torch.cuda.is_available():
        thread.start()
    try:
        yield highest
    finally:
        done.set()


def run(overrides: Sequence[str], steps: int) -> tuple[float, list[dict[str, float]]]:
    """Seconds until the first weights are in the engines, and the metrics of each step with its `wall_seconds`."""
    config = load(CONFIG, list(overrides))
    with run_session(config) as gateway:
        started = time.monotonic()
        algo = GRPOConfig().run(config, sandbox_address=gateway.address, sandbox_token=gateway.token).build_algo()
        try:
            start_s = time.monotonic() - started
            metrics = []
            for number in range(1, steps + 1):
                started = time.monotonic()
                metrics.append(dict(algo.train()["grpo"]) | {"wall_seconds": time.monotonic() - started})
                print(step_line(number, metrics[-1]), flush=True)
            return start_s, metrics
        finally:
            algo.stop()


def step_line(number: int, metrics: Mapping[str, float]) -> str:
    return (
        f"step {number}: {metrics['wall_seconds']:.1f} s, training {metrics['train_seconds']:.1f} s, "
        f"sync {metrics['sync_seconds']:.2f} s, {metrics['generated_tokens']:.0f} tokens, "
        f"accuracy {metrics['accuracy']:.0%}, {metrics['tool_call_rate']:.0%} with a tool call"
    )


def table(start_s: float, metrics: Sequence[Mapping[str, float]], memory_mib: Sequence[int]) -> list[tuple[str, str]]:
    """What was measured; the first step warms up and counts only where it says so."""
    counted = metrics[1:] or metrics

    def median(key: str, digits: int) -> str:
        return f"{statistics.median(row[key] for row in counted):.{digits}f}"

    tokens = sum(row["generated_tokens"] for row in counted)
    rows = [
        ("start, until the first weights are in the engines", f"{start_s:.0f} s"),
        ("generated tokens/s of the whole loop", f"{tokens / sum(row['wall_seconds'] for row in counted):,.0f}"),
        ("a step, of it training", f"{median('wall_seconds', 1)} s, {median('train_seconds', 1)} s"),
        ("a weight sync", f"{median('sync_seconds', 2)} s"),
        (
            "mean difference on the gate's probe, largest of all steps",
            f"{max(row['sync/logprob_diff_mean'] for row in metrics):.2g} nats",
        ),
        ("KL between engine and learner on what was sampled", f"{median('learner/engine_kl', 6)} nats"),
        ("accuracy in the first and the last step", f"{metrics[0]['accuracy']:.0%}, {metrics[-1]['accuracy']:.0%}"),
        ("engines started again", f"{metrics[-1]['runner_restarts']:.0f}"),
    ]
    if memory_mib:
        rows.append(("largest memory in use, each GPU", ", ".join(f"{mib / 1024:.1f} GiB" for mib in memory_mib)))
    return rows


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6B" if on_gpu else "5M")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--full", action="store_true", help="train and send all weights instead of adapters")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides of the configuration"
    )
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = widen(SOURCE, args.shape, Path(folder) / "model", torch.bfloat16 if on_gpu else torch.float32)
        name = torch.cuda.get_device_name() if on_gpu else "no GPU"
        what = f"{num_parameters / 1e6:,.0f}M parameters, {'all weights' if args.full else 'adapters'}, {name}"
        print(what, flush=True)
        overrides = settings(Path(folder) / "model", Path(folder) / "run", full=args.full, on_gpu=on_gpu)
        with highest_memory() as memory_mib:
            start_s, metrics = run([*overrides, *args.set], args.steps)
    lines = [
        f"| {what} | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in table(start_s, metrics, memory_mib)),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
