"""The settings of `tasks.load_tasks`."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, field_validator

from tasks.word_problems.types import Tier
from trajectory.paths import HUGGING_FACE, WORD_PROBLEMS, IsPath
from trajectory.section import Section, Seed
from trajectory.types import TaskKind


class TaskConfig(Section):
    """Where the tasks come from."""

    source: Annotated[str, IsPath(but=(WORD_PROBLEMS,), prefix=HUGGING_FACE)] = WORD_PROBLEMS
    """`word-problems` (generated); a file ending in .jsonl, .json, .parquet, .csv or .tsv, or in one of these and .gz; or
    `hf:name` (`hf:name:subset`): a Hugging Face data set or a folder of its files, read with `datasets`."""

    split: str = "train"
    """For `word-problems`: `train` or `eval`, which share no problem. For `hf:`: the split's name. Files have no split."""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first this many tasks; for `word-problems`: how many to generate (1000 if not set)."""

    kind: TaskKind = "math"
    """How answers are compared: `math` as numbers and expressions, `qa` by the words they share."""

    question_field: str = "question"
    """The field with the question: a text, or a list of chat messages that is one turn of the user. This field name and the
    others may be paths: `extra_info.question`, `prompt.1.content`."""

    answer_field: str = "answer"
    """The field with the gold answer: a text or a number, or a list of them: `reward_model.ground_truth`, `answers.text`.
    Answers in a field of that name with `_aliases` behind it count as well (MuSiQue).
    From a text with `#### gold` only the gold answer is taken; for `math` also from a text with `\\boxed{gold}`. For
    `qa`, true and false are read as yes and no."""

    id_field: str | None = None
    """The field with a task's id. Without one, ids are made from the questions and stay the same between runs."""

    seed: Seed = 0
    """For `word-problems`: selects which ones are generated."""

    tiers: dict[Tier, NonNegativeFloat] = Field(default={"easy": 1.0}, min_length=1)
    """For `word-problems`: how hard they are, as shares (1 and 3 are a quarter and three quarters). Tiers: `easy`, one or
    two operations; `steps`, three to five; `distractors`, irrelevant numbers; `units`, dozens, weeks and hours;
    `chained`, a second sum that needs the first's result; `lookup`, a price that only the search corpus contains."""

    @field_validator("tiers")
    @classmethod
    def _some_share(cls, tiers: dict[Tier, float]) -> dict[Tier, float]:
        if not 0 < sum(tiers.values()) < float("inf"):
            raise ValueError("one share of the tiers must be positive, and their sum finite")
        return tiers
