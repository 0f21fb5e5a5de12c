"""The record that stage 1 keeps of each finished question: as bytes for the journal, and as files for people to read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from actors.repair.types import Attempt, RepairResult
from autotraj.errors import UserError
from rewards.quality import Quality
from trajectory.log import decode_group, encode_group, read_records
from trajectory.records import preference_record, sft_record
from trajectory.types import Group, Trajectory

FORMAT = 1
KEPT, REPAIRED = "kept", "repaired"
"""The `source` of a record in `sft.jsonl`."""
JOURNAL = "journal.log"
"""This file of stage 1's folder has a record for each question that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionRecord:
    """One question: its scored candidates, what was kept, and what became of the rest."""

    group: Group  # of N candidates, with rewards
    qualities: tuple[Quality, ...]  # (N,)
    kept: tuple[int, ...]  # indices of candidates
    repaired: tuple[int, ...]  # indices of the candidates that `repairs` are of, in its order
    problems: tuple[tuple[str, ...], ...]  # what was wrong with each original of `repairs`, as the repairer got it
    repairs: tuple[RepairResult, ...]


def encode(record: QuestionRecord) -> bytes:
    """The record as msgpack, for the journal."""
    content = {
        "format": FORMAT,
        "group": encode_group(record.group),
        "qualities": [dataclasses.asdict(quality) for quality in record.qualities],
        "kept": record.kept,
        "repaired": record.repaired,
        "problems": record.problems,
        "repairs": [
            {
                "accepted": _encode_trajectory(record.group, result.accepted),
                "quality": dataclasses.asdict(result.quality) if result.quality else None,
                "attempts": [dataclasses.asdict(attempt) for attempt in result.attempts],
            }
            for result in record.repairs
        ],
    }
    packed: bytes = msgpack.packb(content, unicode_errors="surrogatepass")
    return packed


def decode(data: bytes) -> QuestionRecord:
    """The record from which `encode` made `data`. Raises ValueError for other bytes."""
    try:
        content = msgpack.unpackb(data, unicode_errors="surrogatepass")
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and this version reads {FORMAT}")
        return QuestionRecord(
            group=decode_group(content["group"]),
            qualities=tuple(Quality(**quality) for quality in content["qualities"]),
            kept=tuple(content["kept"]),
            repaired=tuple(content["repaired"]),
            problems=tuple(tuple(problems) for problems in content["problems"]),
            repairs=tuple(_decode_result(result) for result in content["repairs"]),
        )
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f"not the record of a question: {error}") from error


def read_journal(folder: Path) -> list[QuestionRecord]:
    """The records so far, without an incomplete last one. Raises UserError for a file of another kind or version."""
    path = folder / JOURNAL
    try:
        return [decode(data) for data in read_records(path)] if path.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be continued: {error}; choose another run_dir, or remove that file to begin stage 1 again"
        ) from error


def _encode_trajectory(group: Group, trajectory: Trajectory | None) -> bytes | None:
    if trajectory is None:
        return None
    return encode_group(Group(lease_id=group.lease_id, task=group.task, trajectories=(trajectory,)))


def _decode_result(content: dict[str, Any]) -> RepairResult:
    accepted, quality = content["accepted"], content["quality"]
    return RepairResult(
        accepted=None if accepted is None else decode_group(accepted).trajectories[0],
        quality=None if quality is None else Quality(**quality),
        attempts=tuple(
            Attempt(**attempt | {"quality": Quality(**attempt["quality"]) if attempt["quality"] else None})
            for attempt in content["attempts"]
        ),
    )


# --- the files ------------------------------------------------------------------------------------------------------


def sft_records(record: QuestionRecord, system_prompt: str) -> list[dict[str, Any]]:
    """High-quality candidates and accepted repairs (spec, stage 1, step 6)."""
    task = record.group.task
    kept = [(record.group.trajectories[i], record.qualities[i], KEPT) for i in record.kept]
    repaired = [(r.accepted, r.quality, REPAIRED) for r in record.repairs if r.accepted and r.quality]
    return [
        sft_record(task.question, trajectory.text, system_prompt, task_id=task.id, source=source, quality=quality.score)
        for trajectory, quality, source in [*kept, *repaired]
    ]


def preference_records(record: QuestionRecord, system_prompt: str) -> list[dict[str, Any]]:
    """One pair for each accepted repair: chosen is the repair, rejected its original."""
    task = record.group.task
    return [
        preference_record(
            task.question,
            result.accepted.text,
            record.group.trajectories[index].text,
            system_prompt,
            task_id=task.id,
            quality_chosen=result.quality.score,
            quality_rejected=record.qualities[index].score,
        )
        for index, result in zip(record.repaired, record.repairs, strict=True)
        if result.accepted and result.quality
    ]


def hard_records(record: QuestionRecord, system_prompt: str) -> list[dict[str, Any]]:
    """The trajectories that no attempt repaired, with the reasons."""
    task = record.group.task
    return [
        sft_record(
            task.question,
            record.group.trajectories[index].text,
            system_prompt,
            task_id=task.id,
            golds=list(task.golds),
            problems=list(problems),
            reasons=[attempt.reason for attempt in result.attempts],
        )
        for index, problems, result in zip(record.repaired, record.problems, record.repairs, strict=True)
        if not result.accepted
    ]


def repair_records(record: QuestionRecord) -> list[dict[str, Any]]:
    """The originals with their accepted repairs, and the hard cases without one, for the report."""
    return [
        {
            "task_id": record.group.task.id,
            "question": record.group.task.question,
            "original": record.group.trajectories[index].text,
            "repaired": result.accepted.text if result.accepted else "",
            "problems": list(problems),
            "quality_before": _as_row(record.qualities[index]),
            "quality_after": _as_row(result.quality) if result.quality else {},
            "attempts": [{"reason": a.reason, "temperature": a.temperature} for a in result.attempts],
        }
        for index, problems, result in zip(record.repaired, record.problems, record.repairs, strict=True)
    ]


def describe(records: Sequence[QuestionRecord]) -> dict[str, Any]:
    """Counts and means for `synthesis.json`. `before` and `after` are the same trajectories, those whose repair was
    accepted, as sampled and as repaired; `kept` are those that needed none."""
    accepted = [
        (record.qualities[index], result.quality)
        for record in records
        for index, result in zip(record.repaired, record.repairs, strict=True)
        if result.accepted and result.quality
    ]
    num_repairs = sum(len(record.repairs) for record in records)
    rewards = [reward for record in records for reward in record.group.rewards]
    attempts = [attempt for record in records for result in record.repairs for attempt in result.attempts]
    return {
        "num_questions": len(records),
        "num_candidates": len(rewards),
        "num_correct": sum(reward.correct for reward in rewards),
        "num_kept": sum(len(record.kept) for record in records),
        "num_to_repair": num_repairs,
        "num_repaired": len(accepted),
        "num_hard": num_repairs - len(accepted),
        "num_attempts": len(attempts),
        "failed_attempts": dict(Counter(attempt.reason for attempt in attempts if attempt.reason).most_common()),
        "dimensions": {
            "before": _means(before for before, _ in accepted),
            "after": _means(after for _, after in accepted),
            "kept": _means(record.qualities[i] for record in records for i in record.kept),
        },
    }


def _as_row(quality: Quality) -> dict[str, float]:
    return dict(quality.dimensions) | {"score": quality.score}


def _means(qualities: Iterable[Quality]) -> dict[str, float]:
    rows = [_as_row(quality) for quality in qualities]
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in rows[0]} if rows else {}
