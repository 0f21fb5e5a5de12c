"""`reward-model`: learns from the preference pairs which of two trajectories is the better one.

The pairs of a share of the questions are held out. They are scored at intervals; the best checkpoint is kept, and training
stops when they no longer get better.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotraj import stages
from autotraj.config import RunConfig
from autotraj.errors import UserError
from autotraj.interrupt import Interrupt
from autotraj.pairs import PairAccuracy, load_pairs, pair_accuracy
from autotraj.run_folder import RunFolder
from learners.batching import Pair
from learners.group import LearnerGroup
from trajectory.chat import load_tokenizer


def measure(group: LearnerGroup, pairs: Sequence[Pair]) -> PairAccuracy:
    scores = group.scores([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    return pair_accuracy(scores[: len(pairs)], scores[len(pairs) :])


def train_reward_model(
    config: RunConfig,
    base: str,
    *,
    interrupt: Interrupt,
    on_step: Callable[[int, int, Mapping[str, float]], None],
) -> dict[str, Any]:
    """Trains a scalar head on `base` and writes the best `<run_dir>/reward_model/model`. Ray must be up.

    Returns the stage's figures, as in `metrics.json`. Raises `stages.Interrupted`.
    """
    settings = config.reward_model
    source = stages.require(Path(config.run_dir) / stages.SYNTHESIS / stages.PREFERENCES_FILE, "synthesize")
    pairs = load_pairs(
        source,
        load_tokenizer(base),
        margin=settings.margin,
        mask_results=config.scorer.mask_results,
        held_out=settings.held_out,
        max_tokens=config.learner.micro_batch_tokens,
    )
    if not pairs.train or not pairs.held_out:
        raise UserError(
            f"{source}: {len(pairs.train)} pairs to train on and {len(pairs.held_out)} held out; a reward model needs both. "
            "Synthesise with more questions, or raise reward_model.held_out"
        )
    total = stages.num_steps(len(pairs.train), settings.batch_pairs, settings.epochs)
    learner = stages.learner_config(
        config.learner,
        model=base,
        lr=settings.lr,
        steps=total,
        warmup_ratio=settings.warmup_ratio,
        lora=settings.lora,
        head="scalar",
    )
    folder, checkpoint = RunFolder.stage(Path(config.run_dir) / stages.REWARD_MODEL)
    model = folder.path / "model"
    group = LearnerGroup(learner)
    best = Best(folder.path / "best.json")

    def after(number: int, metrics: Mapping[str, float]) -> bool:
        if number % settings.evaluate_every == 0 or number == total:
            found = measure(group, pairs.held_out)
            folder.write_metrics(
                number, {"held_out/accuracy": found.accuracy, "held_out/margin_mean": found.margin_mean}
            )
            if best.is_better(number, found):
                stages.export(group, model)
                best.keep(folder, number, found)
        on_step(number, total, {**metrics, "held_out/accuracy": best.accuracy})
        return (number - best.step) / settings.evaluate_every > settings.patience

    with folder:
        try:
            group.start()
            stages.supervised(
                group,
                folder,
                checkpoint,
                stages.batches(len(pairs.train), settings.batch_pairs, settings.epochs, config.seed),
                lambda indices: group.pair_step([pairs.train[i] for i in indices]),
                interrupt=interrupt,
                checkpoint_every=10 * settings.evaluate_every,
                on_step=after,
            )
        finally:
            group.shutdown()
        figures = {
            "pair_accuracy": best.accuracy,
            "margin_mean": best.margin_mean,
            "best_step": best.step,
            "num_steps": total,
            "num_pairs": len(pairs.train),
            "num_held_out": len(pairs.held_out),
            "num_too_long": pairs.num_too_long,
            "num_alike": pairs.num_alike,
        }
        folder.write_json("metrics.json", figures)
    return figures


class Best:
    """The best measurement so far; on disk, so that a resumed stage doesn't replace a better model."""

    def __init__(self, path: Path) -> None:
        saved = json.loads(path.read_text()) if path.is_file() else {}
        self.step = int(saved.get("step", 0))
        self.accuracy = float(saved.get("accuracy", 0.0))
        self.margin_mean = float(saved.get("margin_mean", float("-inf")))

    def is_better(self, step: int, found: PairAccuracy) -> bool:
        return (found.accuracy, found.margin_mean) > (self.accuracy, self.margin_mean)

    def keep(self, folder: RunFolder, step: int, found: PairAccuracy) -> None:
        self.step, self.accuracy, self.margin_mean = step, found.accuracy, found.margin_mean
        folder.write_json("best.json", {"step": step, "accuracy": found.accuracy, "margin_mean": found.margin_mean})
