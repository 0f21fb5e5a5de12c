"""What the soak counts as wrong and as leaked, and that a resumed one makes the calls that are left."""

import random

from benchmarks.sandbox_load import HOSTILE, draw
from benchmarks.sandbox_recovery import seconds_until_back, windows_without_a_kill
from benchmarks.sandbox_soak import leaks
from trajectory.types import ToolResult


def test_what_is_wrong_with_a_reply() -> None:
    calls = [draw(random.Random(number), number, 0.5) for number in range(400)]
    hostile = [call for call in calls if call.hostile]
    assert 150 < len(hostile) < 250
    assert {call.name for call in hostile} == set(HOSTILE)
    for call in hostile:
        assert call.wrong(ToolResult(status="timeout")) == ""
    number, call = next((n, call) for n, call in enumerate(calls) if call.name == "print")
    assert call.wrong(ToolResult(status="ok", output=f"{2 * number}\n")) == ""
    assert "printed" in call.wrong(ToolResult(status="ok", output=f"{2 * number + 2}\n"))  # another call's reply
    assert "timeout" in call.wrong(ToolResult(status="timeout"))
    assert draw(random.Random(7), 7, 0.5) == calls[7]


def test_what_is_a_leak() -> None:
    before = {"containers": 3.0, "processes in containers": 12.0, "gateway memory, MiB": 70.0}
    assert leaks(before, {**before, "gateway memory, MiB": 90.0}) == []
    assert leaks(before, {**before, "processes in containers": 13.0}) == [
        "processes in containers: 12 before, 13 after"
    ]
    assert leaks(before, {**before, "gateway memory, MiB": 170.0}) == ["gateway memory, MiB: 70 before, 170 after"]


def test_when_throughput_is_back() -> None:
    """Ten calls/s, a kill at 5 s, nothing for a second, then ten calls/s again."""
    ends = [n / 10 + 0.05 for n in range(100) if not 5.0 <= n / 10 < 6.0]
    assert set(windows_without_a_kill(ends, [5.0])) == {10.0}
    # The first window with four of its five calls begins 0.9 s after the kill.
    assert round(seconds_until_back(ends, 5.0, 10.0, 10.0), 3) == 1.4
    assert seconds_until_back([], 5.0, 10.0, 10.0) == 5.0
