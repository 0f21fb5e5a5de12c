"""Settings of the reward and of a trajectory's quality."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, model_validator

from rewards.dimensions import DIMENSIONS
from trajectory.import_path import ImportPath
from trajectory.section import Section

LARGEST = 100.0
"""Largest absolute value of any part of the reward."""

BUILT_IN = ("outcome", "format", "trajectory", "overlong")
"""The names of the built-in terms, which are the keys of `rewards.terms.REWARD_TERMS`."""


class TermConfig(Section):
    """A reward term of the user's own. See docs/extending.md, "A reward term"."""

    use: ImportPath
    """`module:function`. The function's name is the term's name in metrics, logs and reports."""

    weight: float = Field(default=1.0, ge=-LARGEST, le=LARGEST)
    """Factor of the number that the function returns. The product may be at most 100 in size. 0: it is only shown."""

    @property
    def name(self) -> str:
        return self.use.rpartition(":")[2].rpartition(".")[2]


class RewardConfig(Section):
    """How trajectories are rewarded. The defaults are the paper's format and outcome rewards (arXiv 2601.23032, stage 2)."""

    preset: Literal["default", "paper"] = "default"
    """`paper`: exactly the released formulas. QA's reward-model score is used without normalisation and can only raise the
    reward; for math there is none. `default`: the score is normalised, raises and lowers the reward, and never puts a wrong
    answer above a right one."""

    outcome_weight: float = Field(default=1.0, ge=0, le=LARGEST)
    """Factor of the outcome of a well-formed trajectory. The outcome is 1 or 0 for math, the token F1 for QA."""

    wrong_but_well_formed: float = Field(default=0.1, ge=-LARGEST, le=LARGEST)
    """Reward of a well-formed math trajectory with a wrong answer."""

    bad_format_math: float = Field(default=0.0, ge=-LARGEST, le=LARGEST)
    """Whole reward of a malformed math trajectory, whether its answer is right or wrong."""

    bad_format_qa: float = Field(default=-1.0, ge=-LARGEST, le=LARGEST)
    """Whole reward of a malformed QA trajectory."""

    trajectory_weight: float = Field(default=0.2, ge=0, le=LARGEST)
    """Factor of the reward model's score of a well-formed trajectory, if there is a reward model. 0: the score has no
    effect."""

    trajectory_clip: float = Field(default=2.0, gt=0)
    """Largest |score| that counts, in deviations from the running mean. Preset `paper` has its own clip."""

    overlong_buffer_tokens: int = Field(default=0, ge=0)
    """DAPO's soft overlong punishment: within this many tokens below `overlong_limit_tokens` the reward falls by up to 1.
    0 turns it off."""

    overlong_limit_tokens: int = Field(default=2048, ge=1)
    """Length, in tokens that the model wrote, from which the punishment is 1. Tool results don't count."""

    math_timeout_s: float = Field(default=3.0, gt=0)
    """How long math-verify may take to compare two answers, seconds. After that they count as different."""

    terms: tuple[TermConfig, ...] = ()
    """The user's own terms, `[[reward.terms]]`, which are added to the built-in ones."""

    terms_timeout_s: float = Field(default=30.0, gt=0)
    """How long one of `terms` may take for all trajectories of a task, seconds. After that its process is killed, and the
    group is dropped."""

    @model_validator(mode="after")
    def _terms_with_names(self) -> "RewardConfig":
        taken = list(BUILT_IN)
        for term in self.terms:
            if term.name in taken:
                raise ValueError(
                    f"terms: {term.use!r} is called {term.name!r}, as another term is; give the function another name"
                )
            taken.append(term.name)
        return self

    @model_validator(mode="after")
    def _no_contradictions(self) -> "RewardConfig":
        if self.preset == "paper":
            for name in _PAPERS:
                value, published = getattr(self, name), type(self).model_fields[name].default
                if value != published:
                    raise ValueError(f"preset = 'paper' means {name} = {published}, not {value}: set one of the two")
        if self.wrong_but_well_formed > self.outcome_weight:
            raise ValueError(
                f"wrong_but_well_formed = {self.wrong_but_well_formed} exceeds outcome_weight = {self.outcome_weight}: "
                "wrong answers would be rewarded above right ones"
            )
        if self.bad_format_math > self.wrong_but_well_formed or self.bad_format_qa > 0:
            raise ValueError(
                f"bad_format_math = {self.bad_format_math} must not exceed wrong_but_well_formed = "
                f"{self.wrong_but_well_formed}, nor bad_format_qa = {self.bad_format_qa} 0: "
                "malformed trajectories would be rewarded above well-formed ones"
            )
        return self


_PAPERS = (
    "outcome_weight",
    "wrong_but_well_formed",
    "bad_format_math",
    "bad_format_qa",
    "trajectory_weight",
    "trajectory_clip",
    "overlong_buffer_tokens",
    "terms",
)
"""The values that preset `paper` fixes. They are the published defaults (`trajectory_clip` has none there)."""


class QualityConfig(Section):
    """How stage 1 selects trajectories. The defaults are the paper's (arXiv 2601.23032, stage 1)."""

    weights: dict[str, NonNegativeFloat] = Field(default={"confidence": 0.4, "length": 0.3, "repetition": 0.3})
    """Weight of each dimension in the score; the sum is 1. The names are those of `rewards.dimensions.DIMENSIONS`: the
    paper's three read only the text, `tool_success` and `grounding` also use the tool calls and the question."""

    keep_all_from: float = Field(default=0.90, ge=0, le=1)
    """If every right candidate of a question has at least this score, all of them are kept."""

    keep_best_from: float = Field(default=0.86, ge=0, le=1)
    """Otherwise only the best is kept, if it has at least this score."""

    accept_right_from: float = Field(default=0.86, ge=0, le=1)
    """A repair of a right answer is accepted if it has at least this score."""

    accept_wrong_above: float = Field(default=0.80, ge=0, le=1)
    """A repair of a wrong answer is accepted if its score is above this."""

    @model_validator(mode="after")
    def _weights_of_known_dimensions(self) -> "QualityConfig":
        unknown = sorted(self.weights.keys() - DIMENSIONS.keys())
        if unknown:
            raise ValueError(f"weights names {unknown[0]!r}; the dimensions are {', '.join(DIMENSIONS)}")
        if abs(sum(self.weights.values()) - 1) > 1e-9:
            raise ValueError(f"weights add up to {sum(self.weights.values()):g}, not 1")
        return self
