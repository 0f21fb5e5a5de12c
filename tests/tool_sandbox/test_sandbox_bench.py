"""The bench's arithmetic by hand; the bench itself measures a real sandbox when it is asked to."""

from tool_sandbox.bench import EXPECTED, PRINT, SYMPY, Row, bare, measure, percentile, ratios, render


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([7.0], 0.99) == 7.0


def test_ratios_are_those_of_the_rows() -> None:
    rows = [
        Row("bare python -c, no container", "print", 8, 1.0, 1.0, 50.0, 1),
        Row("bare python -c, no container", "sympy", 8, 1.0, 1.0, 2.0, 1),
        Row("runner alone, no gateway", "print", 1, 5.0, 9.0, 1.0, 1),
        Row("gateway, gRPC", "print", 1, 6.25, 9.0, 1.0, 1),
        Row("gateway, gRPC", "print", 8, 1.0, 1.0, 100.0, 1),
        Row("gateway, gRPC", "sympy", 8, 1.0, 1.0, 40.0, 1),
        Row("gateway, gRPC: a cell of a session", "print", 1, 1.125, 2.0, 800.0, 1),
    ]
    assert ratios(rows) == [
        "print at 8 callers: 2.00 times bare python -c",
        "sympy at 8 callers: 20.0 times bare python -c",
        "gateway over the runner alone: 1.25 ms p50",
        "a session's cell: 1.12 ms p50",
    ]
    assert render(rows[3]) == "| gateway, gRPC | print | 1 | 6.2 | 9.0 | 1.0 | 1 |"


async def test_a_real_subprocess_is_measured_and_its_output_checked() -> None:
    row = await measure("bare", bare, PRINT, 2, 0.01)
    assert (row.code, row.concurrency, row.num_calls) == ("print", 2, 2)
    assert 0 < row.p50_ms <= row.p99_ms
    assert EXPECTED[SYMPY] == "[2, 3]\n"
