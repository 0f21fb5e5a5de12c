"""Makes examples/tiny/base, the model that the default configurations train: `python -m examples.tiny.make_base`.

A Qwen3 of 4 layers × 128 learns from scratch to imitate a mix of good and bad trajectories, and of repairs (recipe.py), by
the same supervised step on the same DeepSpeed engine that the pipeline uses. The committed base: seed 0, 2600 steps of 16;
13 minutes on one busy core (with MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ set to 4000000000; without, glibc gives
memory back at every step); 2.2 MB. On 150 unseen problems of each tier, sampled at temperature 1, right:

                                      easy  steps  distractors  units  chained  lookup
    policy                            51 %   48 %         42 %   47 %     46 %    37 %
      right by a plan, no detour      34 %   31 %         28 %   35 %     33 %    26 %
    started on a plan                 93 %   97 %         90 %   94 %     96 %    90 %
    repairs of its right, poor paths  96 %   92 %         81 %   84 %     90 %    82 %
    repairs of its wrong answers      77 %   83 %         74 %   76 %     84 %    59 %

(Of 400 other easy ones 57.5 %.) What it gets wrong as policy is mostly a choice that GRPO can change, not inability:
40 steps of plain GRPO on the easy tier (grpo.toml) took 400 unseen easy problems to 92 %.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from examples.tiny import recipe
from examples.tiny.probe import report
from learners.batching import Sample
from learners.config import LearnerConfig
from learners.engine import DeepSpeedEngine
from trajectory.chat import encode, render_prompt

BATCH_SIZE = 16
LEARNING_RATE = 3e-3


def to_sample(tokenizer: PreTrainedTokenizerFast, example: recipe.Example) -> Sample:
    """Tokenises each piece by itself, as an episode does. Only the model's own tokens carry a loss."""
    prompt = render_prompt(tokenizer, example.prompt, system_prompt="")
    ids, mask = list(prompt), []
    for piece in example.pieces:
        piece_ids = encode(tokenizer, piece.text)
        ids += piece_ids
        mask += [piece.by_model] * len(piece_ids)
    ids.append(tokenizer.eos_token_id)
    mask.append(True)
    return Sample(ids=np.array(ids, np.int32), prompt_len=len(prompt), mask=np.array(mask, np.bool_))


def train(steps: int, seed: int, out: Path) -> None:
    """Write the trained checkpoint, in bfloat16, to `out`."""
    torch.manual_seed(seed)
    tokenizer = recipe.build_tokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        untrained, trained = Path(scratch, "untrained"), Path(scratch, "trained")
        recipe.build_model(tokenizer).save_pretrained(untrained)
        tokenizer.save_pretrained(untrained)
        engine = DeepSpeedEngine(
            LearnerConfig(
                model=str(untrained),
                zero_stage=0,
                lr=LEARNING_RATE,
                betas=(0.9, 0.95),
                weight_decay=0.1,
                schedule="cosine",
                warmup_steps=min(80, steps // 10),
                micro_batch_tokens=2048,
                total_steps=steps,
                seed=seed,
            )
        )
        examples = recipe.examples(seed, steps * BATCH_SIZE)
        start = time.monotonic()
        for step in range(1, steps + 1):
            batch = [to_sample(tokenizer, example) for example in islice(examples, BATCH_SIZE)]
            metrics = engine.sft_step(batch)
            if step % 100 == 0 or step == steps:
                print(f"step {step}/{steps}  loss {metrics['loss']:.4f}  {time.monotonic() - start:.0f} s", flush=True)
        engine.export_hf(trained)
        AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600, help=f"optimizer steps of {BATCH_SIZE} trajectories")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base", help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the training problems")
    parser.add_argument("--num-eval", type=int, default=200, help="unseen problems of each tier for the final figures")
    args = parser.parse_args()
    logging.disable_progress_bar()
    train(args.steps, args.seed, args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB")
    print(report(args.out, args.num_eval))


if __name__ == "__main__":
    main()
