"""Settings of benchmark evaluation: the files, how often each is sampled, and who judges. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from autotraj.config.run import ConfigError, RunConfig, read_toml, validated
from tasks.config import TaskConfig
from trajectory.section import Section


class JudgeConfig(Section):
    """A language model behind an OpenAI-compatible endpoint that says whether an answer means the same as a gold one."""

    base_url: str
    """Of the endpoint, up to and including `/v1`."""

    model: str
    """The name that the endpoint knows the judge by."""

    api_key_env: str = ""
    """Environment variable that holds the key. Empty: the endpoint asks for none."""

    concurrency: PositiveInt = 16
    """Questions to the judge in flight."""

    max_retries: NonNegativeInt = 3
    """How often a question is asked again after a lost connection, 408, 409, 429 or 5xx, with growing waits."""

    deadline_s: PositiveFloat = 60.0
    """Longest wait for one verdict, retries included."""

    max_answer_chars: PositiveInt = 2000
    """A longer answer isn't shown to the judge and counts as a failure of the judging."""

    max_tokens: PositiveInt = 8
    """Longest reply of the judge. More for a model that thinks where its reply can be read."""


class BenchmarkConfig(Section):
    """One benchmark."""

    name: str = Field(min_length=1)
    """What its figures are filed under."""

    data: TaskConfig
    """Its questions and gold answers."""

    num_samples: PositiveInt = 1
    """Trajectories sampled a question: k of avg@k, the largest of pass@k."""

    temperature: float = Field(default=0.0, ge=0.0)
    """Sampling temperature; 0 is greedy."""

    judged: bool = False
    """Ask the judge about each answer, besides comparing it."""

    @model_validator(mode="after")
    def _samples_differ(self) -> BenchmarkConfig:
        if self.num_samples > 1 and self.temperature == 0.0:
            raise ValueError(
                f"{self.name}: num_samples = {self.num_samples} at temperature 0 samples the same each time"
            )
        return self


class BenchmarkSuite(Section):
    """A file of benchmarks: `[[benchmarks]]` tables and, if any is judged, `[judge]`."""

    benchmarks: tuple[BenchmarkConfig, ...] = Field(min_length=1)
    """What is measured, in this order."""

    judge: JudgeConfig | None = None
    """Who judges."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> BenchmarkSuite:
        names = [benchmark.name for benchmark in self.benchmarks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two benchmarks are called {', '.join(sorted(twice))}")
        if self.judge is None and (judged := [b.name for b in self.benchmarks if b.judged]):
            raise ValueError(f"{', '.join(judged)}: judged = true needs a [judge] section")
        return self


def load_suite(path: str | Path) -> BenchmarkSuite:
    """The benchmarks in a TOML file. Raises ConfigError with a line a problem."""
    data = read_toml(path, called="--benchmarks")
    if "benchmarks" not in data:
        other = (
            "a run's configuration, which is for --config"
            if data.keys() & RunConfig.model_fields.keys()
            else "another file"
        )
        raise ConfigError(
            f"--benchmarks {path}: no suite of benchmarks, as it has no [[benchmarks]] table; it looks like {other}. "
            "An example is examples/benchmarks.toml"
        )
    try:
        return validated(BenchmarkSuite, data)
    except ConfigError as error:
        raise ConfigError("\n".join(f"--benchmarks {path}: {line}" for line in str(error).splitlines())) from None
