"""Where the metrics of every step are written.

To add a place, write a class with the methods of `Tracker` and add a line to `TRACKERS`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from storage.whole import write_whole


class Tracker(Protocol):
    """Takes a run's or a stage's metrics, step by step. Raises OSError if they can't be written."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def forget_after(self, step: int) -> None:
        """Drops the metrics of later steps, which will be taken again; an earlier process may have written them."""

    def close(self) -> None: ...


class JSONLines:
    """`metrics.jsonl`: one object a step, with the time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._file = self._path.open("a", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"time": time.time(), "step": step, **metrics}) + "\n")

    def forget_after(self, step: int) -> None:
        """Also drops a line that a full disk cut short."""
        self._file.close()
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
        write_whole(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", buffering=1)

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class TensorBoard:
    """A `Tracker`: one event file in `<folder>/tensorboard`.

    It doesn't use tensorboardX's `SummaryWriter` (2.6.5): a full disk ends the thread of that, and then `add_scalar` waits
    forever for room in its queue. Here the caller gets the OSError.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # imports torch: seconds

        events = folder / "tensorboard" / "events"
        events.parent.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(events))

    def forget_after(self, step: int) -> None:
        """Makes TensorBoard leave out the metrics of later steps, in this file and in others of the folder."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)  # TensorBoard's mark for a restarted run
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._events.flush()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


TRACKERS: dict[str, Callable[[Path], Tracker]] = {"jsonl": JSONLines, "tensorboard": TensorBoard}
"""Name → a function that makes the tracker of a folder. A run writes to each tracker."""
