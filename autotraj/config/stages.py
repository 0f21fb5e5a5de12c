"""Settings of the stages around the online loop. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from learners.config import LoraConfig
from trajectory.paths import LocalPath
from trajectory.section import Section


class SynthesisConfig(Section):
    """Stage 1: sample, score, and keep or repair."""

    num_questions: PositiveInt = 1000
    """How many of `data`'s questions are used, in their order."""

    num_candidates: PositiveInt = Field(default=8, ge=2)
    """Trajectories sampled for each question."""

    max_attempts: PositiveInt = 3
    """How often a question is sampled after failures that it didn't cause, before it is dropped with the reason."""


class SFTConfig(Section):
    """Supervised fine-tuning on the results of stage 1. The defaults are the paper's (arXiv 2601.23032)."""

    data: LocalPath = ""
    """A file of your own demonstrations to learn from instead of stage 1's: JSON lines, each with `messages`, the last of
    them the assistant's reply. Tool results stand in the reply, as `<code>…</code><result>…</result>`, and carry no loss."""

    include_repaired: bool = True
    """Learn from accepted repairs too. False: only from the policy's own good trajectories."""

    epochs: PositiveInt = 3
    """Passes over the set."""

    batch_size: PositiveInt = 64
    """Trajectories in one step."""

    lr: PositiveFloat = 7e-6
    """Peak learning rate, which falls to 0 as a cosine."""

    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps during which the learning rate rises."""

    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""

    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints. An interruption also writes one."""


class RewardModelConfig(Section):
    """The trajectory reward model: Bradley–Terry on the preference pairs. The defaults are the paper's."""

    path: LocalPath = ""
    """Checkpoint of a reward model for GRPO. Empty: `run` uses that of its own stage, `grpo` uses none."""

    when_unavailable: Literal["drop", "score-without"] = "drop"
    """What happens to a group that the reward model can't score within `scorer.deadline_s`: it is dropped with the
    reason, or it is rewarded for format and outcome alone, with a note on each reward and a count in the metrics."""

    data: LocalPath = ""
    """A file of your own preference pairs to learn from instead of stage 1's: JSON lines, each with `messages` (or `prompt`)
    without the reply, and `chosen` and `rejected`. Pairs of the same `task_id`, or else of the same messages, are held out
    together."""

    epochs: PositiveInt = 2
    """Most passes over the training pairs."""

    batch_pairs: PositiveInt = 32
    """Pairs in one step."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate, which falls to 0 as a cosine."""

    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps during which the learning rate rises."""

    margin: NonNegativeFloat = 0.0
    """Difference of scores, in logits, by which the chosen side should win; above it, a pair has little gradient."""

    held_out: float = Field(default=0.1, gt=0.0, lt=0.5)
    """Share of the questions whose pairs are used for measuring and not for training."""

    evaluate_every: PositiveInt = 20
    """Steps between measurements on the held-out pairs. The best checkpoint is kept."""

    patience: PositiveInt = 5
    """Measurements without improvement after which training stops."""

    lora: LoraConfig | None = None
    """Train adapters and the head instead of all weights."""


class OnlineRepairConfig(Section):
    """Repair during GRPO: bad trajectories become preference pairs, and the reward model follows the policy."""

    enabled: bool = False
    """Repair low-scoring trajectories during GRPO and refresh the reward model with the pairs. Needs a reward model."""

    max_per_group: PositiveInt = 2
    """Most trajectories of one group that are repaired, the worst first."""

    max_in_flight: PositiveInt = 4
    """Most groups that are repaired at the same time. Others are not repaired, but counted."""

    refresh_every: PositiveInt = 20
    """Policy steps between refreshes of the reward model."""

    num_pairs: PositiveInt = 256
    """Number of newest pairs on which a refresh trains, once each."""

    min_pairs: PositiveInt = 16
    """A refresh with fewer new pairs than this is postponed."""

    lr: PositiveFloat = 1e-5
    """Learning rate of a refresh."""
