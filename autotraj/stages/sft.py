"""`sft`: trains the policy on what stage 1 kept and repaired, with the next-token loss on the model's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autotraj.config.run import RunConfig
from autotraj.config.stage_registry import SFT
from autotraj.errors import UserError
from autotraj.interrupt import Interrupt
from autotraj.run_folder.folder import RunFolder
from autotraj.stages.journal import REPAIRED
from autotraj.stages.pipeline import Pipeline
from autotraj.status.progress import StageProgress
from autotraj.training import supervised
from learners.batching import Sample
from learners.group import LearnerGroup
from learners.skipped_steps import was_applied
from trajectory.chat import Tokenizer, load_tokenizer
from trajectory.records import check_sft, encode_conversation, read_jsonl


def run(pipeline: Pipeline) -> dict[str, Any]:
    """The stage, in `pipeline`. Returns its figures. Raises `supervised.Interrupted`."""
    with StageProgress("sft", "steps", pipeline.console) as view:
        figures = sft(pipeline.config, interrupt=pipeline.interrupt, on_step=view.step)
    pipeline.console.print(
        f"sft: {figures['num_steps']} steps on {figures['num_trajectories']} trajectories, last loss "
        f"{figures['last_loss'] or float('nan'):.3f}"
    )
    return figures


def load_samples(path: Path, tokenizer: Tokenizer, eos_id: int | None, *, include_repaired: bool) -> list[Sample]:
    """The records of an `sft.jsonl` as samples. Raises ValueError, with the line, for a file that doesn't hold them."""
    samples = []
    for record in read_jsonl(path, ["messages"], check_sft):
        if record.get("source") == REPAIRED and not include_repaired:
            continue
        encoded = encode_conversation(tokenizer, record["messages"], eos_id=eos_id)
        ids = np.concatenate([encoded.prompt_ids, encoded.response_ids])
        samples.append(Sample(ids=ids, prompt_len=len(encoded.prompt_ids), mask=encoded.mask))
    return samples


def sft(
    config: RunConfig, *, interrupt: Interrupt, on_step: Callable[[int, int, Mapping[str, float]], None]
) -> dict[str, Any]:
    """Trains `config.model` on `<run_dir>/synthesis/sft.jsonl` and writes `<run_dir>/sft/policy`. Ray must be up.

    Calls `on_step(step, num_steps, metrics)` after each step. Returns the stage's figures. Raises `supervised.Interrupted`.
    """
    settings = config.sft
    source = supervised.input_of(SFT.name, config)
    tokenizer = load_tokenizer(config.model)
    eos_id = getattr(tokenizer, "eos_token_id", None)
    try:
        samples = load_samples(source, tokenizer, eos_id, include_repaired=settings.include_repaired)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not samples:
        raise UserError(f"{source} holds no trajectory to learn from; synthesise with more questions or candidates")
    limit = config.learner.micro_batch_capacity
    fitting = [sample for sample in samples if len(sample.ids) <= limit]
    if not fitting:
        raise UserError(
            f"{source}: all {len(samples)} trajectories are longer than a micro-batch of the learner, {limit} tokens; the "
            f"shortest has {min(len(sample.ids) for sample in samples)} tokens: raise learner.micro_batch_tokens"
        )
    total = supervised.num_steps(len(fitting), settings.batch_size, settings.epochs)
    learner = supervised.learner_config(
        config.learner,
        model=config.model,
        lr=settings.lr,
        steps=total,
        warmup_ratio=settings.warmup_ratio,
        lora=settings.lora,
        head="lm",
    )
    folder, checkpoint = RunFolder.stage(config, SFT.folder)
    losses: list[float] = []
    skipped: set[int] = set()  # steps may be taken again

    def after(number: int, metrics: Mapping[str, float]) -> bool:
        if was_applied(metrics):
            losses.append(metrics["loss"])
        else:
            skipped.add(number)
        on_step(number, total, metrics)
        return False

    group = LearnerGroup(learner)
    with folder:
        try:
            supervised.supervised(
                group,
                config,
                folder,
                checkpoint,
                list(supervised.batches(len(fitting), settings.batch_size, settings.epochs, config.seed)),
                lambda indices: group.sft_step([fitting[i] for i in indices]),
                interrupt=interrupt,
                checkpoint_every=settings.checkpoint_every,
                on_step=after,
                finish=lambda: supervised.export(group, folder.location.place("policy")),
            )
        finally:
            group.shutdown()
    return {
        "num_trajectories": len(fitting),
        "num_too_long": len(samples) - len(fitting),
        "num_steps": total,
        "num_skipped_steps": len(skipped),
        "last_loss": losses[-1] if losses else None,
    }
