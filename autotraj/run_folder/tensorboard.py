"""Metrics for TensorBoard, written in the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path


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
