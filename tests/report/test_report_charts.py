"""The report's pure parts on hand numbers: ticks, means, charts, words, diffs."""

import re
import time
import xml.etree.ElementTree as ET

import pytest

from report import charts
from report.data import StageResult, Summary
from report.diff import MAX_TOKENS, Piece, compare
from report.text import count, cut, percent, seconds, short, signed, verdict, visible


def elements(svg: str, tag: str, name: str) -> list[dict[str, str]]:
    """The attributes of all `tag` elements of a class; parsing as XML shows that the chart is well-formed."""
    found = ET.fromstring(svg).iter(tag)
    return [dict(e.attrib) for e in found if name in e.attrib.get("class", "").split()]


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter("text")]


# --- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "num", "ticks"),
    [
        (0, 100, 4, [0, 50, 100]),
        (0, 1, 3, [0, 0.5, 1]),
        (0.58, 0.99, 3, [0.5, 1.0]),  # 0.205 apart at best, so 0.5
        (-0.03, 1.05, 6, [-0.5, 0, 0.5, 1.0, 1.5]),  # 0.216 → 0.5
        (0, 7, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, 3, 3, [0, 2, 4, 6]),  # nothing to span: half of it on either side, in steps of 2
        (0, 0, 3, [-1, 0, 1]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, num: int, ticks: list[float]) -> None:
    assert charts.nice_ticks(low, high, num) == pytest.approx(ticks)


def test_ticks_of_tiny_and_huge_ranges_are_exact() -> None:
    assert charts.nice_ticks(0, 3e-9, 4) == pytest.approx([0, 1e-9, 2e-9, 3e-9], rel=1e-9)
    assert charts.nice_ticks(0, 3e12, 4) == pytest.approx([0, 1e12, 2e12, 3e12])


def test_decades() -> None:
    assert charts.decade_ticks(3e-6, 2e-5) == pytest.approx([1e-6, 1e-5, 1e-4])
    assert charts.decade_ticks(1e-3, 1e-3) == pytest.approx([1e-3, 1e-2])
    assert len(charts.decade_ticks(1e-12, 1e3)) <= 6


def test_a_scale_maps_and_clamps() -> None:
    scale = charts.Scale(0, 10, 100, 200)
    assert [scale(v) for v in (-5, 0, 2.5, 10, 11)] == [100, 100, 125, 200, 200]
    assert charts.Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    assert charts.Scale(3, 3, 0, 10)(3) == 5


def test_a_moving_mean_takes_fewer_neighbours_at_the_ends() -> None:
    assert charts.moving_mean([1, 2, 6, 3], 3) == pytest.approx([1.5, 3, 11 / 3, 4.5])


def test_thinning_means_neighbours() -> None:
    assert charts.thin_out([1, 2, 3, 4, 5], [0, 2, 4, 6, 9], limit=3) == [(1.5, 1), (3.5, 5), (5, 9)]
    assert len(charts.thin_out(range(10_000), [0.0] * 10_000)) <= charts.MAX_POINTS


# --- charts ---------------------------------------------------------------------------------------------------------


def test_a_line_chart_puts_points_where_they_belong() -> None:
    svg = charts.line_chart([1, 3], [0.0, 1.0], label="x", domain=(0, 1))
    # x from 42 to 290; y from 126 (0) up to 10 (1)
    assert [path["d"] for path in elements(svg, "path", "curve")] == ["M42.0 126.0 L290.0 10.0"]
    (dot,) = elements(svg, "circle", "dot")
    assert (dot["cx"], dot["cy"]) == ("290.0", "10.0")
    assert ET.fromstring(svg).attrib["data-points"] == '[[42.0, 126.0, "1", "0"], [290.0, 10.0, "3", "1"]]'


def test_a_noisy_line_gets_its_mean_beside_it() -> None:
    svg = charts.line_chart(range(40), [float(i % 2) for i in range(40)], label="x", window=4)
    assert len(elements(svg, "path", "raw")) == 1
    assert len(elements(svg, "path", "curve")) == 2


def test_a_logarithmic_line_leaves_out_what_is_not_positive() -> None:
    svg = charts.line_chart([1, 2, 3], [0.0, 1e-5, 1e-4], label="x", log=True)
    assert len(ET.fromstring(svg).attrib["data-points"].split("], [")) == 2
    assert charts.line_chart([1, 2], [0.0, -1.0], label="x", log=True) == ""


def test_lines_of_one_point_none_and_equal_values() -> None:
    assert charts.line_chart([], [], label="x") == ""
    assert len(elements(charts.line_chart([5], [2.0], label="x"), "circle", "dot")) == 1
    assert "nan" not in charts.line_chart([1, 2], [3.0, 3.0], label="x").lower()


def test_an_interval_chart_draws_the_interval_and_clips_it_at_the_domain() -> None:
    rows = [charts.Interval("base", 50, 10, "50 %"), charts.Interval("grpo", 98, 5, "98 %")]
    svg = charts.interval_chart(rows, label="x", domain=(0, 100))
    # x from 104 (0) to 302 (100): 1.98 a point
    first, _, _, last, _, _ = elements(svg, "line", "error")
    assert (float(first["x1"]), float(first["x2"])) == pytest.approx((104 + 40 * 1.98, 104 + 60 * 1.98), abs=0.1)
    assert (float(last["x1"]), float(last["x2"])) == pytest.approx((104 + 93 * 1.98, 302), abs=0.1)
    assert [d["cx"] for d in elements(svg, "circle", "dot")] == ["203.0", "298.0"]
    assert "50 %" in texts(svg)


def test_an_interval_that_is_not_known_is_not_drawn() -> None:
    svg = charts.interval_chart(
        [charts.Interval("a", 1, None, "1"), charts.Interval("b", float("nan"), 1, "–")], label=""
    )
    assert elements(svg, "line", "error") == []
    assert len(elements(svg, "circle", "dot")) == 1
    assert charts.interval_chart([], label="") == ""


def test_a_stack_grows_to_both_sides_of_zero() -> None:
    svg = charts.stacked_chart([charts.BarGroup("a", (0.5, 0.25, -0.25, None))], ["p", "q", "r", "s"], label="x")
    # ticks −0.4 … 0.8, step 0.2: 1.2 over 264 px from 104, so 220 px a unit and zero at 192; gaps of 1.5
    spans = {c: elements(svg, "rect", c) for c in "pqrs"}
    assert spans["s"] == []
    for name, start, width in (("p", 192.0, 110), ("q", 302.0, 55), ("r", 137.0, 55)):
        (bar,) = spans[name]
        assert float(bar["x"]) == pytest.approx(start, abs=0.06)
        assert float(bar["width"]) == pytest.approx(width - 1.5, abs=0.06)
    assert charts.stacked_chart([charts.BarGroup("a", (0.0, None))], ["p", "q"], label="x") == ""


def test_bars_are_as_long_as_their_counts() -> None:
    svg = charts.bar_chart([("a", 20), ("b", 10)], label="x")
    # 170 px for 20, minus the gap
    assert [float(b["width"]) for b in elements(svg, "rect", "bar")] == pytest.approx([168.5, 83.5])
    assert charts.bar_chart([], label="x") == ""


def test_dots_before_and_after_are_joined() -> None:
    rows = [charts.BarGroup("a", (0.0, 1.0, None)), charts.BarGroup("b", (None, 0.5, 0.5))]
    svg = charts.dot_chart(rows, ["before", "after", "kept"], label="x", domain=(0, 1))
    (join,) = elements(svg, "line", "join")
    assert (join["x1"], join["x2"]) == ("112.0", "364.0")
    assert [len(elements(svg, "circle", c)) for c in ("before", "after", "kept")] == [1, 2, 1]


def test_labels_are_escaped_and_cut() -> None:
    svg = charts.bar_chart([('</svg><script>alert("1")</script>', 1)], label='"><script>')
    assert "<script" not in svg
    assert ET.fromstring(svg).attrib["aria-label"] == '"><script>'
    assert texts(svg)[0].endswith("…")


# --- words ----------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """With ordinary spaces for those that don't break."""
    return text.replace("\u00a0", " ")


def test_numbers_for_people() -> None:
    assert [short(v) for v in (0, 0.5, 1.02, 17, 3384, 0.00763, 7.6e-06, -5e-4, 2.5e6)] == [
        *("0", "0.5", "1.02", "17", "3.38k", "0.0076", "7.6e−6", "−5e−4", "2.5M"),
    ]
    assert [plain(seconds(v)) for v in (6.14, 42.4, 163.4, 3600, None)] == [
        *("6.1 s", "42 s", "2 min 43 s", "1 h 0 min", "–"),
    ]
    assert [plain(percent(v)) for v in (0.536, 1, None, float("nan"))] == ["53.6 %", "100.0 %", "–", "–"]
    assert [signed(-0.031, 3), signed(0.5), count(1234567)] == ["−0.031", "+0.50", "1,234,567"]


def stages(*results: tuple[str, float, float]) -> Summary:
    return Summary(
        stages=tuple(StageResult(name=n, accuracy=a, accuracy_ci95=ci, num_problems=500) for n, a, ci in results)
    )


@pytest.mark.parametrize(
    ("summary", "sentence"),
    [
        (
            stages(("base", 0.536, 0.044), ("grpo", 0.988, 0.01)),
            "GRPO raised accuracy from 53.6 % to 98.8 % on 500 unseen problems.",
        ),
        (
            stages(("base", 0.5, 0.04), ("sft", 0.7, 0.04), ("grpo", 0.3, 0.04)),
            "SFT and GRPO lowered accuracy from 50.0 % to 30.0 % on 500 unseen problems.",
        ),
        (  # 4 points apart; √(3² + 3²) = 4.24
            stages(("base", 0.50, 0.03), ("sft", 0.54, 0.03)),
            "SFT made no difference that can be told from chance: accuracy went from 50.0 % to 54.0 % on 500 unseen "
            "problems.",
        ),
        (stages(("base", 0.5, 0.04)), "Base answers 50.0 % on 500 unseen problems correctly."),
        (stages(), "No stage was evaluated."),
    ],
)
def test_the_verdict(summary: Summary, sentence: str) -> None:
    assert plain(verdict(summary)) == sentence


def test_what_cannot_be_seen_is_spelled_out() -> None:
    assert visible("a\u202eb\x00\u200b\ud800\U000e0041\r") == "a⟦U+202E⟧b⟦U+0000⟧⟦U+200B⟧⟦U+D800⟧⟦U+E0041⟧⟦U+000D⟧"
    assert visible("x\ny\t√é中😀\ufffd") == "x\ny\t√é中😀\ufffd"


def test_a_long_text_keeps_its_ends() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("a" * 50 + "b" * 50, 10) == "aaaaa\n[… 90 characters left out …]\nbbbbb"
    assert len(cut("\u202e" * 1_000_000, 100)) < 150
    cut("x\ud800" * 10, 7).encode()


# --- diffs ----------------------------------------------------------------------------------------------------------


def test_a_diff_marks_words() -> None:
    diff = compare("Maybe it is 4, I think.", "It is  4, I know.")
    assert diff.before == (Piece("Maybe it", True), Piece(" is 4, I", False), Piece(" think", True), Piece(".", False))
    assert diff.after == (Piece("It", True), Piece(" is  4, I", False), Piece(" know", True), Piece(".", False))
    assert diff.marked


def test_code_changes_show_at_their_operators() -> None:
    diff = compare("print(753+29+3)", "print(753-29*3)")
    assert [p.text for p in diff.before if p.changed] == ["+", "+"]
    assert [p.text for p in diff.after if p.changed] == ["-", "*"]


@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("a", ""), ("", "a"), ("a  b\n", "a b"), ("<think>\n x", " <x>")]
)
def test_both_sides_stay_complete(before: str, after: str) -> None:
    diff = compare(before, after)
    assert "".join(piece.text for piece in diff.before) == before
    assert "".join(piece.text for piece in diff.after) == after


def test_texts_too_long_or_too_different_are_not_marked() -> None:
    assert not compare("a " * (MAX_TOKENS + 1), "a").marked
    assert not compare("one two three", "four five six").marked


def test_hostile_texts_take_bounded_time() -> None:
    started = time.monotonic()
    compare(" ".join(f"w{i % 50} x{i}" for i in range(740)), " ".join(f"w{i % 50} y{i}" for i in range(740)))
    compare("<" * MAX_TOKENS, "<>" * (MAX_TOKENS // 2))
    compare(" " * 1_000_000, "a" * 1_000_000)
    assert time.monotonic() - started < 20  # cubic work would take minutes
    assert re.fullmatch(r"a+", compare(" ", "a" * 100).after[0].text)
