"""Seconds by phase, on a clock that the test moves."""

import pytest
import torch

from learners import phases


def test_phases_add_up_until_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 20.0, 21.0, 30.0, 33.5])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(times))
    clock = phases.PhaseClock(torch.device("cpu"))
    for phase in ("gradients", "optimizer", "gradients"):
        with clock(phase):
            pass
    assert clock.take() == {"gradients": 5.5, "optimizer": 1.0}
    assert clock.take() == {}
