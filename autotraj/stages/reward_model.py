"""`reward-model`: learns from the preference pairs which of two trajectories is better.

The pairs of a share of the questions are held out. They are scored at intervals. The best model is kept, and training
stops when the scores get no better.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotraj.config.run import RunConfig
from autotraj.config.stage_registry import REWARD_MODEL, SYNTHESIZE
from autotraj.errors import UserError
from autotraj.interrupt import Interrupt
from autotraj.preferences.pairs import PairAccuracy, is_held_out, load_pairs, pair_accuracy
from autotraj.run_folder.folder import RunFolder
from autotraj.stages.journal import read_journal
from autotraj.stages.pipeline import Pipeline
from autotraj.status.progress import StageProgress
from autotraj.training import supervised
from learners.batching import Pair
from learners.group import LearnerGroup
from learners.skipped_steps import was_applied
from trajectory.chat import load_tokenizer
from trajectory.reward_input import reward_input

NUM_JUDGED = 256
"""How many sampled trajectories are scored to compare the score with the outcome."""


def run(pipeline: Pipeline) -> dict[str, Any]:
    """The stage, in `pipeline`. Returns its figures. Raises `supervised.Interrupted`."""
    base = supervised.start_of(REWARD_MODEL.name, pipeline.config)
    with StageProgress("reward-model", "steps", pipeline.console) as view:
        figures = train_reward_model(pipeline.config, base, interrupt=pipeline.interrupt, on_step=view.step)
    pipeline.console.print(
        f"reward-model: {figures['pair_accuracy']:.1%} of {figures['num_held_out']} held-out pairs in the right order, "
        f"trained on {figures['num_pairs']}",
        soft_wrap=True,
    )
    return figures


def judged(synthesis: Path, *, held_out: float, mask_results: bool) -> tuple[list[NDArray[np.int32]], list[bool]]:
    """Stage 1's candidates of held-out questions, as the model reads them, and whether each was right."""
    pairs = [
        (reward_input(trajectory, mask_results=mask_results), reward.correct)
        for record in read_journal(synthesis)
        if is_held_out(record.group.task.id, held_out)
        for trajectory, reward in zip(record.group.trajectories, record.group.rewards, strict=True)
    ][:NUM_JUDGED]
    return [ids for ids, _ in pairs], [correct for _, correct in pairs]


def correlation(scores: NDArray[np.float32], correct: Sequence[bool]) -> float | None:
    """Pearson's (point-biserial) correlation of score and outcome; None where one of them doesn't vary."""
    outcome = np.asarray(correct, np.float64)
    if len(outcome) < 2 or not outcome.std() or not np.std(scores):
        return None
    return float(np.corrcoef(np.asarray(scores, np.float64), outcome)[0, 1])


def evaluate_pairs(group: LearnerGroup, pairs: Sequence[Pair]) -> PairAccuracy:
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

    Returns the stage's figures, as in `metrics.json`. Raises `supervised.Interrupted`.
    """
    settings = config.reward_model
    source = supervised.input_of(REWARD_MODEL.name, config)
    pairs = load_pairs(
        source,
        load_tokenizer(base),
        margin=settings.margin,
        mask_results=config.scorer.mask_results,
        held_out=settings.held_out,
        max_tokens=config.learner.micro_batch_capacity,
    )
    if not pairs.train or not pairs.held_out:
        raise UserError(
            f"{source}: {len(pairs.train)} pairs to train on and {len(pairs.held_out)} held out; a reward model needs both. "
            "Synthesise with more questions, or raise reward_model.held_out"
        )
    total = supervised.num_steps(len(pairs.train), settings.batch_pairs, settings.epochs)
    learner = supervised.learner_config(
        config.learner,
        model=base,
        lr=settings.lr,
        steps=total,
        warmup_ratio=settings.warmup_ratio,
        lora=settings.lora,
        head="scalar",
    )
    folder, checkpoint = RunFolder.stage(config, REWARD_MODEL.folder)
    model = folder.location.place("model")
    group = LearnerGroup(learner)
    sequences, correct = judged(
        config.folder / SYNTHESIZE.folder, held_out=settings.held_out, mask_results=config.scorer.mask_results
    )
    if not folder.location.has_model("model"):  # the process was killed while it replaced the model at a URI
        (folder.path / "best.json").unlink(missing_ok=True)
    best = Best(folder.path / "best.json")

    skipped: set[int] = set()  # steps may be taken again

    def after(number: int, metrics: Mapping[str, float]) -> bool:
        if not was_applied(metrics):
            skipped.add(number)
        if number % settings.evaluate_every == 0 or number == total:
            found = evaluate_pairs(group, pairs.held_out)
            folder.write_metrics(
                number, {"held_out/accuracy": found.accuracy, "held_out/margin_mean": found.margin_mean}
            )
            if best.is_better(number, found):
                supervised.export(group, model)
                related = correlation(group.scores(sequences), correct) if sequences else None
                best.keep(folder, number, found, related)
        on_step(number, total, {**metrics, "held_out/accuracy": best.accuracy})
        return (number - best.step) / settings.evaluate_every > settings.patience

    with folder:
        try:
            supervised.supervised(
                group,
                config,
                folder,
                checkpoint,
                list(supervised.batches(len(pairs.train), settings.batch_pairs, settings.epochs, config.seed)),
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
            "outcome_correlation": best.outcome_correlation,
            "best_step": best.step,
            "num_steps": total,
            "num_skipped_steps": len(skipped),
            "num_pairs": len(pairs.train),
            "num_held_out": len(pairs.held_out),
            "num_too_long": pairs.num_too_long,
            "num_alike": pairs.num_alike,
        }
        folder.write_json("metrics.json", figures)
    return figures


class Best:
    """The best measurement so far. It is on disk, so that a resumed stage doesn't replace a better model."""

    def __init__(self, path: Path) -> None:
        try:
            saved = json.loads(path.read_text()) if path.is_file() else {}
            self.step = int(saved.get("step", 0))
            self.accuracy = float(saved.get("accuracy", 0.0))
            self.margin_mean = float(saved.get("margin_mean", float("-inf")))
            self.outcome_correlation: float | None = saved.get("outcome_correlation")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} can't be read: {error}; remove it, and the checkpoints beside it, to begin this stage again"
            ) from error

    def is_better(self, step: int, found: PairAccuracy) -> bool:
        return (found.accuracy, found.margin_mean) > (self.accuracy, self.margin_mean)

    def keep(self, folder: RunFolder, step: int, found: PairAccuracy, outcome_correlation: float | None) -> None:
        self.step, self.accuracy, self.margin_mean = step, found.accuracy, found.margin_mean
        self.outcome_correlation = outcome_correlation
        folder.write_json(
            "best.json",
            {
                "step": step,
                "accuracy": found.accuracy,
                "margin_mean": found.margin_mean,
                "outcome_correlation": outcome_correlation,
            },
        )
