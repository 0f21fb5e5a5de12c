"""`synthesize`: samples candidates, scores them, keeps the good and repairs the bad, while other questions are sampled.

    ledger ──lease──▶ rollout actors ──N candidates──▶ score, split ──bad ones──▶ repairers ──▶ journal ──▶ files
       ▲                                                    └── none are bad ──────────────────────▲
       └── handed back, or dropped with a reason

A question is done when its record is in the journal, which is append-only. After a kill, finished questions stay done and
the others begin again. The files are made from the journal at the end.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.repair.types import Attempt, RepairRequest, RepairResult
from actors.work import Work
from autotraj.config.run import RunConfig
from autotraj.config.stage_registry import PREFERENCES_FILE, SFT_FILE, SYNTHESIZE
from autotraj.errors import Stalled, UserError
from autotraj.interrupt import Interrupt
from autotraj.loop.grpo import rollout_timeout_of
from autotraj.planning import preflight
from autotraj.preferences import requests as repair_requests
from autotraj.runners.calls import CallResult, Failed
from autotraj.runners.pool import RunnerPool
from autotraj.runners.repairers import repairer_pool
from autotraj.sampling.failures import FailuresInARow
from autotraj.sampling.groups import GroupSource
from autotraj.sampling.scoring import score_group
from autotraj.stages import journal as synthesis_record
from autotraj.stages.journal import JOURNAL, QuestionRecord, read_journal
from autotraj.stages.pipeline import Pipeline
from autotraj.status.progress import StageProgress
from autotraj.training.supervised import Interrupted
from trajectory.chat import load_tokenizer
from trajectory.ledger import Ledger
from trajectory.log import RecordLog
from trajectory.records import distinct, write_jsonl
from trajectory.trainer_columns import dataset_info, preference_columns, sft_columns
from trajectory.types import Group, Task

POLL_S = 0.25


def run(pipeline: Pipeline, pool: RunnerPool) -> dict[str, Any]:
    """The stage, in `pipeline`, with `pool` for the engines. Returns its figures. Raises `supervised.Interrupted`."""
    config = pipeline.config
    folder = pipeline.path / SYNTHESIZE.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (
        StageProgress("synthesize", "questions", pipeline.console) as view,
        repairer_pool(config, pipeline.gateway.access, pool) as repairers,
    ):
        repairers.wait_ready(everyone=False)

        def on_progress(progress: Progress) -> None:
            view.show(progress.num_done, progress.num_questions, _synthesis_note(progress))
            pipeline.push(only_if_due=True)

        synthesis = SynthesisPass(
            config,
            folder,
            pool,
            repairers,
            rollout_timeout_s=rollout_timeout_of(config),
            on_progress=on_progress,
        )
        summary = synthesis.run(pipeline.train_tasks[: config.synthesis.num_questions], pipeline.interrupt)
    dataset_info = summary.pop("dataset_info")
    (folder / "dataset_info.json").write_text(json.dumps(dataset_info, indent=2) + "\n")
    (folder / "synthesis.json").write_text(json.dumps(summary, indent=2) + "\n")
    pipeline.console.print(
        f"synthesize: {summary['num_candidates']} candidates of {summary['num_questions']} questions; "
        f"{summary['num_kept']} kept, {summary['num_repaired']} repaired, {summary['num_hard']} hard; "
        f"{summary['num_sft']} distinct to learn from ({summary['num_sft_duplicates']} duplicates left out) "
        f"({summary['seconds']:.0f} s, {summary['tokens_per_second']:.0f} tokens/s)",
        soft_wrap=True,
    )
    return summary


def _synthesis_note(progress: Progress) -> str:
    speed = progress.num_tokens / progress.seconds if progress.seconds else 0.0
    return (
        f"{progress.num_kept} kept, {progress.num_repaired} repaired, {progress.num_hard} hard, "
        f"{progress.num_dropped} dropped; {speed:.0f} tokens/s"
    )


@dataclass(slots=True)
class Progress:
    """The figures that the terminal shows."""

    num_questions: int
    num_done: int = 0
    num_dropped: int = 0
    num_kept: int = 0
    num_repaired: int = 0
    num_hard: int = 0
    num_tokens: int = 0  # of candidates, in this process
    seconds: float = 0.0

    def add(self, record: QuestionRecord) -> None:
        num_accepted = sum(result.accepted is not None for result in record.repairs)
        self.num_done += 1
        self.num_kept += len(record.kept)
        self.num_repaired += num_accepted
        self.num_hard += len(record.repairs) - num_accepted


@dataclass(frozen=True, slots=True)
class _Assessed:
    """A question whose candidates are scored and split."""

    group: Group
    assessment: repair_requests.Assessment


class SynthesisPass:
    """One pass over the questions. `repairers` is `runners` itself when the policy's engine repairs."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        runners: RunnerPool,
        repairers: RunnerPool,
        *,
        rollout_timeout_s: float,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.config = config
        self.folder = folder
        self.runners = runners
        self.repairers = repairers
        self.rollout_timeout_s = rollout_timeout_s
        self.on_progress = on_progress
        # Twice as many groups as fill an actor: while some wait for tools, others are sampled.
        self._per_runner = 2 * config.rollout.max_concurrent_episodes // config.synthesis.num_candidates + 1
        self._failures = FailuresInARow("synthesize", self._per_runner * runners.num_runners)
        self._to_repair: deque[str] = deque()  # lease ids that wait for a repairer
        self._under_repair: dict[str, _Assessed] = {}
        self._num_submitted: Counter[str] = Counter()  # how often a question's repairs were given out
        self._num_recorded = 0
        self._last_progress = time.monotonic()

    def run(self, tasks: Sequence[Task], interrupt: Interrupt) -> dict[str, Any]:
        """Works on all tasks that the journal doesn't hold yet, then writes the files; returns `synthesis.json`'s content.

        Raises Interrupted when a person asked to stop, `Stalled` when nothing came back for `grpo.step_timeout_s`, and
        GroupsFail when all questions failed, or too many in a row.
        """
        started = self._last_progress = time.monotonic()
        done = read_journal(self.folder)
        unknown = {record.group.task.id for record in done} - {task.id for task in tasks}
        if unknown:
            raise UserError(
                f"{self.folder / JOURNAL} holds {len(unknown)} questions that aren't in `data` (one is {min(unknown)}): "
                "it was made with other settings. Choose another run_dir, or remove the folder"
            )
        progress = Progress(num_questions=len(tasks))
        for record in done:
            progress.add(record)
        seen = {record.group.task.id for record in done}
        remaining = [task for task in tasks if task.id not in seen]
        drop_reasons: dict[str, int] = {}
        if remaining:
            journal = RecordLog(self.folder / JOURNAL)
            source = GroupSource(
                Ledger(remaining, seed=self.config.seed, max_attempts=self.config.synthesis.max_attempts),
                self.runners,
                self._assess,
                failures=self._failures,
                seed_of=lambda lease: repair_requests.seed_of(self.config.seed, lease.task, lease.attempt),
                timeout_s=self.rollout_timeout_s,
            )
            try:
                with interrupt.deferred():
                    drop_reasons = self._work(len(remaining), source, journal, progress, interrupt, started)
            finally:
                source.close()
                journal.close()
        progress.seconds = time.monotonic() - started
        return self.write_files(progress, drop_reasons)

    def _work(
        self,
        num_questions: int,
        source: GroupSource[_Assessed],
        journal: RecordLog,
        progress: Progress,
        interrupt: Interrupt,
        started: float,
    ) -> dict[str, int]:
        ledger = source.ledger
        while True:
            if interrupt.requested:
                raise Interrupted
            counts = ledger.counts()
            if counts.trained + counts.dropped == num_questions:
                if not progress.num_done:
                    self._failures.check_all()
                return dict(ledger.drop_reasons)
            room = self._per_runner * self.runners.num_ready - self.runners.num_in_flight(Work.ROLLOUT)
            source.admit(min(room, counts.pending))
            outcomes = self.runners.poll(POLL_S)
            if self.repairers is not self.runners:
                outcomes += self.repairers.poll(0.0)
                self.repairers.restore()
            self.runners.restore()
            for outcome in outcomes:
                self._last_progress = time.monotonic()
                if outcome.method != Work.REPAIR:
                    source.take(outcome)
                elif (record := self._take_repair(outcome)) is not None:
                    self._record(record, journal, ledger, progress)
            for assessed in source.collect():
                if assessed.assessment.requests:
                    self._under_repair[assessed.group.lease_id] = assessed
                    self._to_repair.append(assessed.group.lease_id)
                else:
                    self._record(_record(assessed, ()), journal, ledger, progress)
            source.check()
            self._submit_repairs()
            progress.num_dropped = counts.dropped
            progress.num_tokens = source.num_tokens
            progress.seconds = time.monotonic() - started
            self.on_progress(progress)
            self._check_deadline()

    def _assess(self, group: Group) -> _Assessed:
        scored = score_group(group, self.config.reward)
        return _Assessed(scored, repair_requests.assess(scored, self.config.quality))

    def _submit_repairs(self) -> None:
        while self._to_repair and (runner_id := self.repairers.idle_slot()) is not None:
            key = self._to_repair.popleft()
            self._num_submitted[key] += 1
            assessed = self._under_repair[key]
            requests = list(assessed.assessment.requests)
            self.repairers.submit(
                runner_id,
                key,
                Work.REPAIR,
                timeout_s=repair_requests.timeout_s(self.config, len(requests)),
                requests=requests,
                seed=repair_requests.seed_of(self.config.seed, assessed.group.task, self._num_submitted[key]),
            )

    def _take_repair(self, outcome: CallResult) -> QuestionRecord | None:
        """The question's record; None if its repairs are tried again because an actor, or the endpoint or engine that it
        uses, was down."""
        was_down = isinstance(outcome, Failed) or any(result.outage for result in outcome.value)
        if was_down and self._num_submitted[outcome.key] < self.config.synthesis.max_attempts:
            self._to_repair.append(outcome.key)
            return None
        assessed = self._under_repair.pop(outcome.key)
        if isinstance(outcome, Failed):
            return _record(assessed, tuple(_given_up(r, outcome.reason) for r in assessed.assessment.requests))
        return _record(assessed, tuple(outcome.value))

    def _record(self, record: QuestionRecord, journal: RecordLog, ledger: Ledger, progress: Progress) -> None:
        journal.append_bytes(synthesis_record.encode(record))
        self._num_recorded += 1
        ledger.train([record.group.lease_id], step=self._num_recorded)
        progress.add(record)

    def _check_deadline(self) -> None:
        waited, limit = time.monotonic() - self._last_progress, self.config.grpo.step_timeout_s
        if waited > limit:
            raise Stalled(
                f"nothing came back for {waited:.0f} s (grpo.step_timeout_s = {limit:.0f}): {self.runners.describe()}; "
                f"{len(self._under_repair)} questions under repair: {self.repairers.describe()}"
            )

    def write_files(self, progress: Progress, drop_reasons: dict[str, int]) -> dict[str, Any]:
        """Makes from the journal all files that later stages and people read."""
        records = sorted(read_journal(self.folder), key=lambda record: record.group.task.id)
        prompt = self.config.episode.system_prompt
        tokenizer = load_tokenizer(self.config.model)
        sft = [r for q in records for r in synthesis_record.sft_records(q, prompt)]
        pairs = [r for q in records for r in synthesis_record.preference_records(q, prompt)]
        distinct_sft, distinct_pairs = distinct(sft, ["messages"]), distinct(pairs, ["messages", "chosen", "rejected"])
        write_jsonl(self.folder / SFT_FILE, [sft_columns(record, tokenizer) for record in distinct_sft])
        write_jsonl(
            self.folder / PREFERENCES_FILE, [preference_columns(record, tokenizer) for record in distinct_pairs]
        )
        write_jsonl(self.folder / "hard.jsonl", [r for q in records for r in synthesis_record.hard_records(q, prompt)])
        write_jsonl(self.folder / "repairs.jsonl", [r for q in records for r in synthesis_record.repair_records(q)])
        summary = synthesis_record.describe(records) | {
            "num_sft": len(distinct_sft),
            "num_sft_duplicates": len(sft) - len(distinct_sft),
            "num_pairs": len(distinct_pairs),
            "num_pair_duplicates": len(pairs) - len(distinct_pairs),
            "template_note": preflight.template_note(self.config),
            "num_dropped": progress.num_dropped,
            "drop_reasons": drop_reasons,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.num_tokens / progress.seconds, 1) if progress.seconds else 0.0,
        }
        return summary | {"dataset_info": dataset_info()}


def _record(assessed: _Assessed, results: tuple[RepairResult, ...]) -> QuestionRecord:
    assessment = assessed.assessment
    return QuestionRecord(
        group=assessed.group,
        qualities=assessment.qualities,
        kept=assessment.kept,
        repaired=assessment.to_repair,
        problems=tuple(request.problems for request in assessment.requests),
        repairs=results,
    )


def _given_up(request: RepairRequest, reason: str) -> RepairResult:
    attempt = Attempt(reason=reason, quality=None, text="", temperature=0.0)
    return RepairResult(accepted=None, quality=None, attempts=(attempt,))
