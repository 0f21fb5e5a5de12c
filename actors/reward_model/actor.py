"""The reward-model actor: it scores trajectories of several callers in common batches, and can replace its model meanwhile.

    score() ─┐                        ┌─ batches by length ─▶ worker thread (torch)
    score() ─┼─▶ queue ─▶ one round ──┤                            │
    score() ─┘                        └─ answers, version ◀────────┘

A round takes calls in the order in which they came, so all scores of a call come from one model version. `load` reads the
next model while rounds go on, and the next round uses it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actors.config import ScorerConfig
from models.packing import padded_batches
from storage.objects import fetch

if TYPE_CHECKING:
    from actors.reward_model.scorer import RewardScorer

logger = logging.getLogger(__name__)

ROUND_MICRO_BATCHES = 8
"""A round ends at about this many full micro-batches, so that later calls and a new model don't wait longer than that."""


class RewardModelError(Exception):
    """A reward model did not do what was requested."""


class RewardModelTimeout(RewardModelError):
    """The reward model did not answer within a deadline. The message says which call waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The result of one call."""

    values: NDArray[np.float32]  # (N,) the model's raw scores
    version: int  # the version of the model that computed all of them


@dataclass(eq=False, slots=True)
class _Call:
    """A call of `score` that waits."""

    sequences: list[NDArray[np.int32]]
    answer: asyncio.Future[Scores]
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = sum(map(len, self.sequences))


class RewardModelActor:
    """Serves one checkpoint. An asynchronous Ray actor: `ray.remote(RewardModelActor).options(num_cpus=…).remote(config)`.

    `start` must have returned before any other call.
    """

    def __init__(self, config: ScorerConfig, index: int = 0) -> None:
        self._config = config
        self._index = index
        self._scorer: RewardScorer | None = None
        self._version = 0
        self._queue: deque[_Call] = deque()
        self._arrived = asyncio.Event()
        self._loading = asyncio.Lock()
        self._serving: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "reward-model", initializer=_set_threads, initargs=(config.num_cpus,))
        self._busy_since: float | None = None
        self._counts = dict.fromkeys(
            ("calls", "answered", "timed_out", "failed", "sequences", "tokens", "padded_tokens", "batches", "swaps"), 0
        )
        self._busy_s = 0.0

    def __repr__(self) -> str:
        return f"RewardModelActor({self._index})"

    async def start(self, path: str, version: int) -> None:
        """Load the checkpoint at `path` as `version` and begin to serve. Raises as `load` does."""
        await self.load(path, version)
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())

    async def load(self, path: str, version: int) -> None:
        """Replace the model by the checkpoint at `path`. Calls continue meanwhile and keep their place in the queue.

        Both models are in memory for a short time. If this fails, the present one stays in service. Raises ValueError for
        a checkpoint that is no reward model, `RewardModelTimeout` after `load_timeout_s`, and `RewardModelError` if it
        can't be read. The caller numbers the versions: a run that is set back serves an older version again.
        """
        limit = self._config.load_timeout_s
        try:
            async with asyncio.timeout(limit), self._loading:
                scorer = await asyncio.to_thread(self._read, path)
                self._counts["swaps"] += self._scorer is not None
                self._scorer, self._version = scorer, version
        except TimeoutError:
            raise RewardModelTimeout(f"{self!r} did not load {path} within load_timeout_s = {limit:g} s") from None
        except ValueError:
            raise
        except Exception as error:  # transformers, safetensors and the file system may raise anything
            raise RewardModelError(f"{self!r} could not load {path}: {error}") from error
        logger.info("%r serves version %d from %s", self, version, path)

    async def score(self, sequences: Sequence[NDArray[np.int32]], deadline_s: float | None = None) -> Scores:
        """The reward of each token sequence (see `trajectory.reward_input`), within `deadline_s` (None: configured).

        Raises ValueError for a sequence that the model can't read, `RewardModelTimeout`, and `RewardModelError` if the
        model failed or was shut down. The failure of one call doesn't affect others.
        """
        self._check_serving()
        if not sequences:
            return Scores(values=np.zeros(0, np.float32), version=self._version)
        limit = self._config.deadline_s if deadline_s is None else deadline_s
        call = _Call([np.asarray(ids) for ids in sequences], asyncio.get_running_loop().create_future())
        self._queue.append(call)
        self._arrived.set()
        self._counts["calls"] += 1
        try:
            async with asyncio.timeout(limit):
                scores = await call.answer
        except TimeoutError:
            self._counts["timed_out"] += 1
            raise RewardModelTimeout(
                f"a caller waited {limit:g} s for {self!r} to score {len(call.sequences)} sequences; {self._doing()}"
            ) from None
        except Exception:
            self._counts["failed"] += 1
            raise
        finally:
            if call in self._queue:
                self._queue.remove(call)
        self._counts["answered"] += 1
        return scores

    async def stats(self) -> dict[str, float]:
        """Counters since the start, the version in service, and the number of waiting calls."""
        return {
            **self._counts,
            "busy_seconds": self._busy_s,
            "queued_calls": len(self._queue),
            "version": self._version,
        }

    async def shutdown(self) -> None:
        """Stop serving. Waiting calls fail. A forward pass that runs ends by itself."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving], timeout=1.0)
        self._thread.shutdown(wait=False, cancel_futures=True)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _read(self, path: str) -> RewardScorer:
        from actors.reward_model.scorer import RewardScorer  # imports torch and transformers, which takes seconds

        return RewardScorer(fetch(path), on_gpu=self._config.num_gpus > 0)

    def _check_serving(self) -> None:
        if self._serving is None:
            raise RewardModelError(f"{self!r} was asked before start() returned")
        if self._serving.done():
            raise RewardModelError(f"{self!r} has stopped serving")

    def _doing(self) -> str:
        if self._busy_since is None:
            return "its worker is idle"
        busy_s = time.monotonic() - self._busy_since
        return f"its worker has been on one batch for {busy_s:.1f} s, {len(self._queue)} calls wait behind it"

    async def _serve(self) -> None:
        round_: list[_Call] = []
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while round_ := self._next_round():
                    await self._score_round(round_)
        finally:
            for call in [*round_, *self._queue]:
                _fail(call, RewardModelError(f"{self!r} was shut down"))

    def _next_round(self) -> list[_Call]:
        """The first calls of the queue; at least one if any waits."""
        calls: list[_Call] = []
        room = ROUND_MICRO_BATCHES * self._config.micro_batch_tokens
        while self._queue and (not calls or self._queue[0].num_tokens <= room):
            calls.append(self._queue.popleft())
            room -= calls[-1].num_tokens
        return calls

    async def _score_round(self, calls: Sequence[_Call]) -> None:
        scorer, version = self._scorer, self._version
        assert scorer is not None, "start() has loaded one"
        entries: list[tuple[_Call, NDArray[np.int32]]] = []
        for call in calls:
            try:
                scorer.check(call.sequences)
                entries += [(call, ids) for ids in call.sequences]
            except ValueError as error:
                _fail(call, error)
        values = np.zeros(len(entries), np.float32)
        for batch in padded_batches([len(ids) for _, ids in entries], self._config.micro_batch_tokens):
            wanted = [i for i in batch if not entries[i][0].answer.done()]  # the others' callers have gone
            if not wanted:
                continue
            try:
                values[wanted] = await self._forward(scorer, [entries[i][1] for i in wanted])
            except Exception as error:  # out of memory, a failing kernel: torch may raise anything
                for i in wanted:
                    message = f"{self!r}, version {version}, failed on a batch of {len(wanted)} sequences: {error!r}"
                    _fail(entries[i][0], RewardModelError(message))
        at = 0
        for call in dict.fromkeys(call for call, _ in entries):
            own = values[at : (at := at + len(call.sequences))].copy()
            if not np.isfinite(own).all():
                _fail(call, RewardModelError(f"{self!r}, version {version}, scored {own[~np.isfinite(own)][0]}"))
            elif not call.answer.done():
                call.answer.set_result(Scores(values=own, version=version))

    async def _forward(self, scorer: RewardScorer, sequences: list[NDArray[np.int32]]) -> NDArray[np.float32]:
        self._busy_since = started = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, scorer.score, sequences)
        finally:
            self._busy_since = None
            self._busy_s += time.monotonic() - started
            lengths = [len(ids) for ids in sequences]
            self._counts["batches"] += 1
            self._counts["sequences"] += len(lengths)
            self._counts["tokens"] += sum(lengths)
            self._counts["padded_tokens"] += len(lengths) * max(lengths)


def _fail(call: _Call, error: Exception) -> None:
    if not call.answer.done():
        call.answer.set_exception(error)


def _set_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)
