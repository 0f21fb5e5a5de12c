"""Settings of the stages around the online loop. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from learners.config import LoraConfig
from trajectory.paths import LocalPath
from trajectory.section import Section

StageName = Literal["synthesize", "sft", "reward-model", "grpo"]


class SynthesisConfig(Section):
    """Stage 1: sample, score, keep or repair."""

    num_questions: PositiveInt = 1000
    """How many of `data`'s questions are worked on, in their order."""

    num_candidates: PositiveInt = Field(default=8, ge=2)
    """Trajectories sampled a question."""

    max_attempts: PositiveInt = 3
    """How often a question is sampled again after a failure that isn't its own before it is dropped, with the reason."""


class SFTConfig(Section):
    """Supervised fine-tuning on what stage 1 made. Defaults: the paper's (arXiv 2601.23032)."""

    include_repaired: bool = True
    """Learn from accepted repairs too; False: from the policy's own good trajectories alone."""

    epochs: PositiveInt = 3
    """Passes over the set."""

    batch_size: PositiveInt = 64
    """Trajectories a step."""

    lr: PositiveFloat = 7e-6
    """Peak learning rate; it falls to 0 as a cosine."""

    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises."""

    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""

    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints; an interruption writes one too."""


class RewardModelConfig(Section):
    """The trajectory reward model: Bradley–Terry on the preference pairs. Defaults: the paper's."""

    path: LocalPath = ""
    """Checkpoint of a reward model for GRPO to score with. Empty: `run` takes the one of its own stage, `grpo` none."""

    when_unavailable: Literal["drop", "score-without"] = "drop"
    """What becomes of a group that the reward model can't score within `scorer.deadline_s`: dropped with the reason, or
    rewarded for format and outcome alone, with a note on each reward and a count in the metrics."""

    epochs: PositiveInt = 2
    """Passes over the training pairs, at most."""

    batch_pairs: PositiveInt = 32
    """Pairs a step."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate; it falls to 0 as a cosine."""

    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises."""

    margin: NonNegativeFloat = 0.0
    """How much higher the chosen side must score before a pair stops to count, in logits."""

    held_out: float = Field(default=0.1, gt=0.0, lt=0.5)
    """Share of the questions whose pairs are not trained on but measured."""

    evaluate_every: PositiveInt = 20
    """Steps between measurements on the held-out pairs; the best checkpoint is kept."""

    patience: PositiveInt = 5
    """Measurements without improvement after which training stops."""

    lora: LoraConfig | None = None
    """Train adapters and the head instead of all weights."""


class OnlineRepairConfig(Section):
    """Repair while GRPO runs: bad trajectories become preference pairs, and the reward model follows the policy."""

    enabled: bool = False
    """Repair low-scoring trajectories during GRPO and refresh the reward model from the pairs. Needs a reward model."""

    max_per_group: PositiveInt = 2
    """Trajectories of one group that are repaired, the worst first."""

    max_in_flight: PositiveInt = 4
    """Groups under repair at a time; others pass unrepaired, and are counted."""

    refresh_every: PositiveInt = 20
    """Policy steps between refreshes of the reward model."""

    num_pairs: PositiveInt = 256
    """The newest pairs that a refresh trains on, once each."""

    min_pairs: PositiveInt = 16
    """A refresh with fewer new pairs is put off."""

    lr: PositiveFloat = 1e-5
    """Learning rate of a refresh."""
