"""Trajectories and repairs for the report's viewer: selected, cut to size, split into blocks. Pure functions.

Every text that leaves this file went through `report.text.cut`, and the template escapes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from report.data import Repair, Repairs, StageSamples
from report.diff import Diff, compare
from report.text import count, cut, decimal, seconds, signed, stage_name, words
from trajectory import markup
from trajectory.tools import TOOLS
from trajectory.types import Group, Reward, Trajectory, Turn

MAX_TRAJECTORIES = 120
MAX_REPAIRS = 60
MAX_QUESTION_CHARS = 1500
MAX_TEXT_CHARS = 8000
"""Most characters of one trajectory, and of either side of a repair."""
MAX_BLOCK_CHARS = 4000
MAX_BLOCKS = 60
MAX_NOTES = 12

ItemResult = Literal["won", "lost", "unscored", "repaired", "hard"]

OUTCOME_WORDS: dict[ItemResult, str] = {
    "won": "✓ won",
    "lost": "✗ lost",
    "unscored": "not scored",
    "repaired": "↻ repaired",
    "hard": "△ hard case",
}

_LABELS = {"think": "Thought", "result": "Tool result", "answer": "Answer"}


@dataclass(frozen=True, slots=True)
class ShownBlock:
    """A part of a trajectory as it is shown. `kind` is its style."""

    kind: str  # think, call, result, answer, text
    label: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An entry of the viewer's list, which can be filtered by `stage` and `outcome`."""

    stage: str
    outcome: ItemResult
    question: str
    score: str  # short, for the list
    golds: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()  # of the reward; the last is the total
    notes: tuple[str, ...] = ()
    blocks: tuple[ShownBlock, ...] = ()
    diff: Diff | None = None
    shifts: tuple[tuple[str, str, str], ...] = ()  # quality by dimension, before and after a repair
    attempts: tuple[str, ...] = ()

    @property
    def outcome_words(self) -> str:
        return OUTCOME_WORDS[self.outcome]


def choose(samples: Sequence[StageSamples], limit: int = MAX_TRAJECTORIES) -> list[tuple[str, Group, int]]:
    """(stage, group, index in it) of at most `limit` trajectories, as equally many of each stage as there are.

    The first success and the first failure of every group come before its other trajectories, whose texts are often equal.
    """
    queues = [_in_order_of_interest(stage) for stage in samples]
    quotas = _quotas([len(queue) for queue in queues], limit)
    chosen: list[tuple[str, Group, int]] = []
    for stage, queue, quota in zip(samples, queues, quotas, strict=True):
        chosen.extend((stage.stage, stage.groups[g], t) for g, t in sorted(queue[:quota]))
    return chosen


def _in_order_of_interest(samples: StageSamples) -> list[tuple[int, int]]:
    ranked = []
    for g, group in enumerate(samples.groups):
        seen: Counter[ItemResult] = Counter()
        for t in range(len(group.trajectories)):
            outcome = _outcome(_reward(group, t))
            ranked.append((seen[outcome], g, t))
            seen[outcome] += 1
    return [(g, t) for _, g, t in sorted(ranked)]


def _quotas(sizes: Sequence[int], limit: int) -> list[int]:
    """How many to take of each, as equal as possible: what a small one doesn't use goes to the others."""
    quotas = [0] * len(sizes)
    for left, index in zip(range(len(sizes), 0, -1), sorted(range(len(sizes)), key=lambda i: sizes[i]), strict=True):
        quotas[index] = min(sizes[index], limit // left)
        limit -= quotas[index]
    return quotas


def items(samples: Sequence[StageSamples], repairs: Repairs | None) -> list[Item]:
    """The viewer's entries: first the repairs, as they come first in a run, then trajectories by stage."""
    chosen = [trajectory_item(stage, group, index) for stage, group, index in choose(samples)]
    return [*map(repair_item, repairs.shown[:MAX_REPAIRS] if repairs else ()), *chosen]


def trajectory_item(stage: str, group: Group, index: int) -> Item:
    """One trajectory with its score, the breakdown of its reward, and its turns."""
    trajectory, reward = group.trajectories[index], _reward(group, index)
    facts = [
        ("ended by", words(trajectory.finish_reason)),
        ("tool calls", str(trajectory.num_tool_calls)),
        ("tokens written", count(trajectory.num_generated_tokens)),
        ("took", seconds(trajectory.duration_s)),
    ]
    if versions := sorted({segment.policy_version for segment in trajectory.segments if segment.end > segment.start}):
        facts.append(("policy version", "–".join(map(str, dict.fromkeys((versions[0], versions[-1]))))))
    if reward:
        facts.append(("format", "well-formed" if reward.format_ok else "broken"))
    parts = [(words(name), signed(value)) for name, value in list(reward.parts.items())[:MAX_NOTES]] if reward else []
    notes = [words(note) for note in reward.notes[:MAX_NOTES]] if reward else []
    if trajectory.error:
        notes.append(cut(trajectory.error, 500))
    return Item(
        stage=stage_name(stage),
        outcome=_outcome(reward),
        question=cut(group.task.question, MAX_QUESTION_CHARS),
        score=decimal(reward.total) if reward else "",
        golds=cut(" or ".join(group.task.golds[:MAX_NOTES]), 300),
        facts=tuple(facts),
        parts=(*parts, ("total", signed(reward.total))) if reward else (),
        notes=tuple(notes),
        blocks=fit(trajectory_blocks(trajectory)),
    )


def repair_item(repair: Repair) -> Item:
    """A repair beside its original, with the problems of the original and every attempt."""
    before, after = repair.quality_before or {}, repair.quality_after or {}
    names = list(dict.fromkeys([*before, *after]))[:MAX_NOTES]
    original, repaired = cut(repair.original, MAX_TEXT_CHARS), cut(repair.repaired or "", MAX_TEXT_CHARS)
    return Item(
        stage="synthesis",
        outcome="repaired" if repair.repaired else "hard",
        question=cut(repair.question, MAX_QUESTION_CHARS),
        score=f"{decimal(before.get('score'))} → {decimal(after.get('score'))}" if "score" in after else "",
        notes=tuple(words(problem) for problem in repair.problems[:MAX_NOTES]),
        blocks=() if repair.repaired else fit(text_blocks(repair.original)),
        diff=compare(original, repaired) if repair.repaired else None,
        shifts=tuple((words(name), decimal(before.get(name)), decimal(after.get(name))) for name in names),
        attempts=tuple(
            (words(attempt.reason) if attempt.reason else "accepted")
            + (f" (temperature {decimal(attempt.temperature, 1)})" if attempt.temperature is not None else "")
            for attempt in repair.attempts[:MAX_NOTES]
        ),
    )


def trajectory_blocks(trajectory: Trajectory) -> Iterator[ShownBlock]:
    """The blocks of a trajectory: for each turn what the model wrote, then what its tool returned."""
    if not trajectory.turns:
        yield from text_blocks(trajectory.text)
    for number, turn in enumerate(trajectory.turns):
        for block in text_blocks(turn.text if number else trajectory.opening + turn.text):
            # The text of a turn is only what the model wrote, so a result in it is invented.
            yield ShownBlock("result", "Result that the model made up", block.text) if block.kind == "result" else block
        yield from _result_block(turn)


def text_blocks(text: str) -> Iterator[ShownBlock]:
    """The blocks of a whole text, and the text outside of any block."""
    end = 0
    for block in markup.parse(text):
        if outside := text[end : block.start].strip():
            yield ShownBlock("text", "Outside of any tag", outside)
        tool = TOOLS.get(block.tag)
        kind, label = ("call", tool.label) if tool else (block.tag, _LABELS[block.tag])
        yield ShownBlock(kind, label if block.closed else f"{label}, not closed", block.content.strip("\n"))
        end = block.end
    if outside := text[end:].strip():
        yield ShownBlock("text", "Outside of any tag", outside)


def fit(blocks: Iterator[ShownBlock]) -> tuple[ShownBlock, ...]:
    """`blocks` with their texts cut to the limits of one trajectory. A last block says how many are left out."""
    kept: list[ShownBlock] = []
    room = MAX_TEXT_CHARS
    for block in blocks:
        if len(kept) == MAX_BLOCKS or room <= 0:
            left_out = 1 + sum(1 for _ in blocks)
            kept.append(ShownBlock("text", "Left out", f"{count(left_out)} more blocks"))
            break
        text = cut(block.text, min(room, MAX_BLOCK_CHARS))
        kept.append(ShownBlock(block.kind, block.label, text))
        room -= len(text)
    return tuple(kept)


def _result_block(turn: Turn) -> Iterator[ShownBlock]:
    result = turn.tool_result
    if result is not None:
        label = f"Tool result: {words(result.status)}, {1000 * result.duration_s:.0f} ms"
        text = "\n".join(part for part in (result.output.strip("\n"), result.message) if part)
        yield ShownBlock("result", label, text or "(no output)")
    elif turn.tool_call is not None:
        yield ShownBlock("result", "Tool result", "(the call was not run)")


def _reward(group: Group, index: int) -> Reward | None:
    return group.rewards[index] if index < len(group.rewards) else None


def _outcome(reward: Reward | None) -> ItemResult:
    if reward is None:
        return "unscored"
    return "won" if reward.correct else "lost"


def left_out(samples: Sequence[StageSamples], repairs: Repairs | None) -> str:
    """A sentence that says what the viewer leaves out."""
    shown = len(choose(samples))
    held = sum(len(group.trajectories) for stage in samples for group in stage.groups)
    parts = []
    if held > shown or any(stage.num_left_out != 0 for stage in samples):
        parts.append(f"{count(shown)} trajectories of those that were logged")
    if repairs and (total := repairs.num_repaired + repairs.num_hard) > (num := min(MAX_REPAIRS, len(repairs.shown))):
        parts.append(f"{count(num)} of {count(total)} repairs")
    limits = f"texts are cut at {count(MAX_TEXT_CHARS)} characters"
    return f"The page shows {' and '.join(parts)}; {limits}." if parts else f"On this page {limits}."
