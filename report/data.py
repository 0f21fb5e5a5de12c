"""The data of a report, as types, and how it is read from a run's folder.

    run folder ──load_report──▶ ReportData ──page.render_page──▶ report.html

A part that doesn't exist or can't be read is a `Missing`, with the sentence that replaces it on the page. So an
unfinished run has a report, too.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from trajectory.log import read_log
from trajectory.types import Group

STAGE_FOLDERS = ("sft", "reward_model", "grpo")
"""Folders of the stages that have a section of their own on the page."""
NOTES_FILE = "notes.json"
"""File of a run or a stage: sentences on how the model is computed, such as that sequences are padded, not packed."""

MAX_GROUPS_READ = 64
"""Groups that are kept of each stage's log; the rest is only counted."""
MAX_REPAIRS_READ = 64
"""Repairs that are kept of each kind, accepted and hard."""
MAX_LOG_MIB = 512
"""Of a training log above this size, only the first groups are read and shown, MiB."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Missing:
    """A part that can't be shown. `why` is one sentence for the page."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """The evaluation of one stage, an entry of `summary.json`. Half-widths belong to 95 % confidence intervals."""

    name: str
    accuracy: float  # 0..1
    num_problems: int
    accuracy_ci95: float | None = None
    mean_reward: float | None = None
    mean_reward_ci95: float | None = None
    tool_call_rate: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)  # means, whose sum is mean_reward
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """`summary.json`: the stages in the order in which they ran."""

    stages: tuple[StageResult, ...]
    total_seconds: float | None = None
    model: str = ""
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """Mean quality by dimension: of repaired trajectories before and after repair, and of those kept unchanged."""

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesisCounts:
    """`synthesis/synthesis.json`: the number of trajectories by outcome."""

    num_questions: int
    num_candidates: int
    num_kept: int
    num_to_repair: int
    num_repaired: int
    num_hard: int
    dimensions: Dimensions = Dimensions()
    failed_attempts: dict[str, int] = field(default_factory=dict)  # reason → attempts
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over steps. Steps rise, and values are finite."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


Metrics = dict[str, Series]
"""A stage's `metrics.jsonl` by metric name; only metrics that have a value at some step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairAttempt:
    """One attempt of the repairer. An empty reason means that it was accepted."""

    reason: str = ""
    temperature: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """A line of `synthesis/repairs.jsonl`. An empty `repaired` is a hard case. Texts come from a model and are hostile."""

    task_id: str
    question: str
    original: str
    repaired: str | None = ""
    problems: tuple[str, ...] = ()
    quality_before: dict[str, float] | None = None  # dimension, and "score"
    quality_after: dict[str, float] | None = None
    attempts: tuple[RepairAttempt, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairs:
    """The repairs that the page shows, and how many there are of each kind."""

    shown: tuple[Repair, ...]
    num_repaired: int
    num_hard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSamples:
    """Scored groups of one stage. `num_left_out` more are in its log (None: more, not counted)."""

    stage: str
    groups: tuple[Group, ...]
    num_left_out: int | None = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that a report shows."""

    name: str
    finished: datetime | None
    summary: Summary | Missing
    synthesis: SynthesisCounts | Missing
    sft: Metrics | Missing
    reward_model: Metrics | Missing
    reward_model_figures: dict[str, float] | Missing
    grpo: Metrics | Missing
    other_stages: dict[str, Metrics | Missing]  # by the name of the folder
    samples: tuple[StageSamples, ...] | Missing
    repairs: Repairs | Missing
    notes: tuple[str, ...]  # from all stages, on how the model is computed


def load_report(run_dir: str | Path) -> ReportData:
    """Read the run folder at `run_dir`. Raises FileNotFoundError only if there is no such folder."""
    path = Path(run_dir)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run folder; `python -m autotraj run` makes one")
    # A folder of a single GRPO stage has its metrics at the root.
    summary = _json(path / "summary.json", Summary, "the results of the stages")
    grpo, root = path / "grpo/metrics.jsonl", path / "metrics.jsonl"
    return ReportData(
        name=path.resolve().name,
        finished=_finished(path),
        summary=summary,
        synthesis=_json(path / "synthesis/synthesis.json", SynthesisCounts, "the figures of synthesis and repair"),
        sft=read_metrics(path / "sft/metrics.jsonl", "the SFT stage"),
        reward_model=read_metrics(path / "reward_model/metrics.jsonl", "the reward-model stage"),
        reward_model_figures=_figures(path / "reward_model/metrics.json"),
        grpo=read_metrics(root if root.is_file() and not grpo.is_file() else grpo, "the GRPO stage"),
        other_stages={
            file.parent.name: read_metrics(file, "this stage")
            for file in sorted(path.glob("*/metrics.jsonl"))
            if file.parent.name not in STAGE_FOLDERS
        },
        samples=_samples(path, () if isinstance(summary, Missing) else [stage.name for stage in summary.stages]),
        repairs=_repairs(path / "synthesis/repairs.jsonl"),
        notes=read_notes(path),
    )


def read_notes(run_dir: Path) -> tuple[str, ...]:
    """The notes of learners in any stage, each sentence once. A broken file counts as empty."""
    found: list[str] = []
    for path in _notes_files(run_dir):
        with suppress(OSError, ValueError, RecursionError):
            listed = json.loads(path.read_bytes())
            found += [sentence for sentence in listed if isinstance(sentence, str)] if isinstance(listed, list) else []
    return tuple(dict.fromkeys(found))


def _notes_files(run_dir: Path) -> list[Path]:
    known = [run_dir / stage / NOTES_FILE for stage in ("", *STAGE_FOLDERS)]
    return [*known, *(file for file in sorted(run_dir.glob(f"*/{NOTES_FILE}")) if file not in known)]


def read_metrics(path: Path, what: str) -> Metrics | Missing:
    """The series of a `metrics.jsonl`. The lines of a step add up, and a later value of a step replaces an earlier one, as
    after a resume.

    Lines that aren't JSON objects with a step (such as an incomplete last line) and values that aren't finite are skipped.
    """
    by_step: dict[float, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                entry = _object(line)
                if entry is not None and (step := _number(entry.get("step"))) is not None:
                    by_step.setdefault(step, {}).update(entry)
    except OSError:
        return Missing(f"No metrics of {what}: this run has no {_place(path)}.")
    points: dict[str, list[tuple[float, float]]] = {}
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            if name not in ("step", "time") and (number := _number(value)) is not None:
                points.setdefault(name, []).append((step, number))
    if not points:
        return Missing(f"No metrics of {what}: {_place(path)} holds no step yet.")
    return {
        name: Series(tuple(step for step, _ in pairs), tuple(value for _, value in pairs))
        for name, pairs in points.items()
    }


def _json(path: Path, kind: type[T], what: str) -> T | Missing:
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_bytes()))
    except OSError:
        return Missing(f"No file with {what}: this run has no {_place(path)}.")
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        return Missing(f"The file with {what}, {_place(path)}, can't be read: {where}: {problem['msg']}.")
    except (ValueError, RecursionError) as error:
        return Missing(f"The file with {what}, {_place(path)}, isn't JSON: {error}.")


def _figures(path: Path) -> dict[str, float] | Missing:
    found = _json(path, dict[str, Any], "the reward model's held-out figures")
    if isinstance(found, Missing):
        return found
    return {name: number for name, value in found.items() if (number := _number(value)) is not None}


def _samples(path: Path, order: Sequence[str]) -> tuple[StageSamples, ...] | Missing:
    """`samples/<stage>.log`, first the stages in `order`; if there are none, both ends of a GRPO run's training log."""
    logs = list((path / "samples").glob("*.log"))
    logs.sort(key=lambda log: (order.index(log.stem) if log.stem in order else len(order), log.name))
    try:
        stages = [_stage_samples(log) for log in logs] or _training_samples(path / "trajectories.log")
    except ValueError as error:
        return Missing(f"A log of trajectories can't be read: {error}.")
    kept = tuple(stage for stage in stages if stage.groups)
    return kept or Missing("No trajectories to show: this run has neither samples/ nor trajectories.log.")


def _stage_samples(log: Path) -> StageSamples:
    groups = read_log(log)
    kept = tuple(islice(groups, MAX_GROUPS_READ))
    return StageSamples(stage=log.stem, groups=kept, num_left_out=sum(1 for _ in groups))


def _training_samples(log: Path) -> list[StageSamples]:
    if not log.is_file():
        return []
    groups = read_log(log)
    first = tuple(islice(groups, MAX_GROUPS_READ // 2))
    if log.stat().st_size > MAX_LOG_MIB << 20:
        return [StageSamples(stage="training, start", groups=first, num_left_out=None)]
    count = 0
    last: deque[Group] = deque(maxlen=MAX_GROUPS_READ // 2)
    for group in groups:
        last.append(group)
        count += 1
    return [
        StageSamples(stage="training, start", groups=first),
        StageSamples(stage="training, end", groups=tuple(last), num_left_out=count - len(last)),
    ]


def _repairs(path: Path) -> Repairs | Missing:
    adapter = TypeAdapter(Repair)
    shown: list[Repair] = []
    counts = {True: 0, False: 0}
    try:
        for entry in _objects(path):
            try:
                repair = adapter.validate_python(entry)
            except ValidationError:
                continue
            accepted = bool(repair.repaired)
            counts[accepted] += 1
            if counts[accepted] <= MAX_REPAIRS_READ:
                shown.append(repair)
    except OSError:
        return Missing(f"No repairs to show: this run has no {_place(path)}.")
    if not shown:
        return Missing(f"No repairs to show: {_place(path)} holds none.")
    return Repairs(shown=tuple(shown), num_repaired=counts[True], num_hard=counts[False])


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (entry for line in file if (entry := _object(line)) is not None)


def _object(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _number(value: Any) -> float | None:
    """A finite number as float, else None. JSON's integers may be too large for a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    # With larger numbers, the arithmetic of a chart would overflow to infinity.
    return number if math.isfinite(number) and abs(number) < 1e300 else None


def _finished(path: Path) -> datetime | None:
    """The time when the run wrote its summary, or else its last metrics."""
    for name in ("summary.json", "grpo/metrics.jsonl", "metrics.jsonl"):
        if (path / name).is_file():
            return datetime.fromtimestamp((path / name).stat().st_mtime, UTC)
    return None


def _place(path: Path) -> str:
    """The path of a file as a person sees it in the run folder."""
    return f"{path.parent.name}/{path.name}" if path.parent.name in {"synthesis", *STAGE_FOLDERS} else path.name
