"""The bench's arithmetic by hand; the bench itself measures a real sandbox when it is asked to."""

import asyncio
import itertools

from tool_sandbox.bench import (
    EXPECTED,
    PRINT,
    SYMPY,
    BenchRow,
    Way,
    bare,
    measure_in_turns,
    measure_paced,
    percentile,
    ratios,
    render_row,
    time_calls,
)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([7.0], 0.99) == 7.0


def test_ratios_are_those_of_the_rows() -> None:
    rows = [
        BenchRow("bare python -c, no container", "print", 8, 1.0, 1.0, 50.0, 1),
        BenchRow("bare python -c, no container", "sympy", 8, 1.0, 1.0, 2.0, 1),
        BenchRow("runner alone, no gateway", "print", 1, 5.0, 9.0, 1.0, 1),
        BenchRow("gateway, gRPC", "print", 1, 6.25, 9.0, 1.0, 1),
        BenchRow("gateway, gRPC", "print", 8, 1.0, 1.0, 100.0, 1),
        BenchRow("gateway, gRPC", "sympy", 8, 1.0, 1.0, 40.0, 1),
        BenchRow("gateway, gRPC, with pauses", "print", 32, 8.0, 20.0, 50.0, 1),
        BenchRow("gateway, gRPC: a cell of a session", "print", 1, 1.125, 2.0, 800.0, 1),
    ]
    assert ratios(rows) == [
        "print at 8 callers: 2.00 times bare python -c",
        "sympy at 8 callers: 20.0 times bare python -c",
        "gateway over the runner alone: 1.25 ms p50",
        "a session's cell: 1.12 ms p50",
        "print at 32 callers and 50 calls/s: p99 2.5 times p50",
    ]
    assert render_row(rows[3]) == "| gateway, gRPC | print | 1 | 6.2 | 9.0 | 1.0 | 1 |"


async def test_a_real_subprocess_is_measured_and_its_output_checked() -> None:
    row = await time_calls("bare", bare, PRINT, 2, 0.01)
    assert (row.code, row.concurrency, row.num_calls) == ("print", 2, 2)
    assert 0 < row.p50_ms <= row.p99_ms
    assert EXPECTED[SYMPY] == "[2, 3]\n"


async def test_ways_are_measured_in_turns() -> None:
    asked: list[str] = []

    def way(name: str) -> Way:
        async def call(code: str) -> str:
            asked.append(name)
            await asyncio.sleep(0.05)
            return EXPECTED[code]

        return call

    rows = await measure_in_turns({"a": way("a"), "b": way("b")}, PRINT, 1, 0.9)
    assert [row.way for row in rows] == ["a", "b"]
    assert [row.num_calls for row in rows] == [asked.count("a"), asked.count("b")]
    assert [name for name, _ in itertools.groupby(asked)] == ["a", "b", "a", "b"]  # 0.9 s are two turns of each


async def test_paced_callers_make_the_load_that_was_asked_for() -> None:
    """200 calls/s of ten callers, each of which takes 1 ms: a slow machine can only make it fewer."""

    async def way(code: str) -> str:
        await asyncio.sleep(0.001)
        return EXPECTED[code]

    row = await measure_paced("way", way, PRINT, 10, 1.0, 200.0)
    assert 20 <= row.num_calls <= 300
    assert (row.way, row.concurrency) == ("way", 10)
    assert row.p50_ms >= 1.0
