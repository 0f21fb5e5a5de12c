"""Settings of benchmark evaluation: the files, how often each is sampled, and the judge. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from autotraj.config.run import ConfigError, RunConfig, read_toml, validated
from tasks.config import TaskConfig
from trajectory.section import Section


class JudgeConfig(Section):
    """A language model behind an OpenAI-compatible endpoint that says whether an answer means the same as a gold one."""

    base_url: str
    """The endpoint's address, up to and including `/v1`."""

    model: str
    """The judge's name on that endpoint."""

    api_key_env: str = ""
    """Environment variable that contains the key. Empty: the endpoint needs none."""

    concurrency: PositiveInt = 16
    """Questions to the judge that run at once."""

    max_retries: NonNegativeInt = 3
    """How often a question is repeated after a lost connection, 408, 409, 429 or 5xx, with growing waits."""

    deadline_s: PositiveFloat = 60.0
    """Longest wait for one verdict, seconds, including retries."""

    max_answer_chars: PositiveInt = 2000
    """A longer answer isn't shown to the judge. It counts as one that could not be judged."""

    max_tokens: PositiveInt = 8
    """Most tokens of the judge's reply. Set more for a model that writes its reasoning into the reply."""


class BenchmarkConfig(Section):
    """One benchmark."""

    name: str = Field(min_length=1)
    """The name under which its figures are stored."""

    data: TaskConfig
    """Its questions and gold answers."""

    num_samples: PositiveInt = 1
    """Trajectories sampled for each question: k of avg@k, and the largest k of pass@k."""

    temperature: float = Field(default=0.0, ge=0.0)
    """Sampling temperature. 0 is greedy."""

    judged: bool = False
    """Also ask the judge about each answer."""

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
    """The benchmarks, in the order in which they are measured."""

    judge: JudgeConfig | None = None
    """The judge's settings."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> BenchmarkSuite:
        names = [benchmark.name for benchmark in self.benchmarks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two benchmarks are called {', '.join(sorted(twice))}")
        if self.judge is None and (judged := [b.name for b in self.benchmarks if b.judged]):
            raise ValueError(f"{', '.join(judged)}: judged = true needs a [judge] section")
        return self


def load_suite(path: str | Path) -> BenchmarkSuite:
    """The benchmarks in a TOML file. Raises ConfigError with one line for each problem."""
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
