"""The report page: built from a run folder of real parts, and safe whatever a model wrote."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from report_run import Page, group, make_run, repair, solved, trajectory, write_lines, write_log

from report import page as report
from report import viewer
from report.data import StageSamples
from trajectory.types import ToolCall, ToolResult, Turn

pytestmark = pytest.mark.slow

HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> ]]> \u202edesrever\u202c \x00 \" ' ` {{ 7*7 }} "
    "</textarea></style><svg onload=alert(1)> \ud800"
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "my-run")


# --- the page -------------------------------------------------------------------------------------------------------


def test_a_run_becomes_a_page(run_dir: Path) -> None:
    path = report.write_report(run_dir)
    assert path == run_dir / "report.html"
    assert sorted(p.name for p in run_dir.glob(".*")) == []  # nothing half-written is left
    text = Page(path.read_text(encoding="utf-8")).text
    for expected in (
        "SFT and GRPO raised accuracy from 53.6 % to 98.8 % on 500 unseen problems.",
        "my-run",
        "examples/tiny/base",
        "10 min 11 s",
        "98.8 % ± 1.0",
        "−0.010",  # overlong
        "kept (1,422)",
        "no tool call",
        "Tool result: ok, 9 ms 42",
        "print(6 * 7)",
        "reward outcome +1.00 format +0.00 trajectory +0.25 = +1.25",
        "42 or forty-two",
        "96.2 %",
        "Held-out pair accuracy",
        "attempts: 1. no tool call (temperature 0.3) 2. accepted (temperature 0.7)",
        "All other GRPO metrics that change (1)",
    ):
        assert expected in text
    assert "No file" not in text
    assert "No metrics" not in text


def test_a_repair_stands_beside_its_original_as_a_diff(run_dir: Path) -> None:
    html = report.write_report(run_dir).read_text(encoding="utf-8")
    assert "&lt;think&gt;<del>Maybe 41</del>.&lt;/think&gt;" in html
    assert "&lt;think&gt;<ins>It is 42</ins>.&lt;/think&gt;" in html


def test_entries_can_be_filtered_by_stage_and_outcome(run_dir: Path) -> None:
    page = Page(report.write_report(run_dir).read_text(encoding="utf-8"))
    rows = [(a["data-stage"], a["data-outcome"]) for tag, a in page.tags if tag == "li" and "data-stage" in a]
    assert rows == [
        *(("synthesis", "repaired"), ("synthesis", "hard"), ("base", "won"), ("base", "lost")),
        *(("SFT", "won"), ("SFT", "lost"), ("GRPO", "won"), ("GRPO", "lost")),
    ]


def test_the_page_loads_nothing(run_dir: Path) -> None:
    html = report.write_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action", "style", "data", "poster", "background"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    style, script = (report.PAGE / "page.css").read_text(), (report.PAGE / "page.js").read_text()
    assert not re.search(r"url\(|@import|https?:", style + script)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|import\(", script)


def test_a_browser_may_run_only_our_script(run_dir: Path) -> None:
    html = report.write_report(run_dir).read_text(encoding="utf-8")
    (policy,) = [a["content"] or "" for _, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    for tag, source in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{source} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_every_control_has_a_label_and_every_chart_a_description(run_dir: Path) -> None:
    page = Page(report.write_report(run_dir).read_text(encoding="utf-8"))
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(ids)
    assert {(a.get("href") or "")[1:] for tag, a in page.tags if tag == "a"} <= set(ids)


# --- hostile text ---------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text(run_dir: Path) -> None:
    shape = Page(report.write_report(run_dir).read_text(encoding="utf-8"))
    bad = group(solved(HOSTILE, HOSTILE), solved(HOSTILE, index=1), question=HOSTILE, correct=(True, False))
    write_log(run_dir / "samples/base.log", [bad])
    write_lines(run_dir / "synthesis/repairs.jsonl", [repair(HOSTILE, HOSTILE + " more", HOSTILE), repair(HOSTILE, "")])
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["model"] = HOSTILE
    summary["stages"][0] |= {"name": HOSTILE, "reward_parts": {HOSTILE: 0.5}}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    synthesis = json.loads((run_dir / "synthesis/synthesis.json").read_text())
    synthesis |= {"failed_attempts": {HOSTILE: 3}, "dimensions": {"before": {HOSTILE: 0.5}}}
    (run_dir / "synthesis/synthesis.json").write_text(json.dumps(synthesis))
    write_lines(run_dir / "grpo/metrics.jsonl", [{"step": s, HOSTILE: float(s)} for s in range(3)])

    html = report.write_report(run_dir).read_bytes().decode("utf-8")
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in shape.tags}
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1
    assert page.comments == []
    assert html.count("<!") == 1  # the doctype
    assert html.count("</script") == html.count("</style") == 1
    assert "{{ 7*7 }}" in page.text  # nothing is rendered twice
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", html)
    assert "⟦U+202E⟧desrever⟦U+202C⟧ ⟦U+0000⟧" in page.text
    assert "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)>" in page.text


def test_a_result_that_the_model_wrote_is_called_so() -> None:
    turn = Turn(text="<result>41</result> so <answer>41", start=0, end=9, result_end=9)
    blocks = list(viewer.trajectory_blocks(trajectory([turn], turn.text)))
    assert [(b.kind, b.label, b.text) for b in blocks] == [
        ("result", "Result that the model made up", "41"),
        ("text", "Outside of any tag", "so"),
        ("answer", "Answer, not closed", "41"),
    ]


def test_failed_tools_and_missing_results_are_shown() -> None:
    call = ToolCall(tool="python", content="x")
    late = ToolResult(status="timeout", message="killed after 5 s", duration_s=5.0)
    turns = [
        Turn(text="<code>x</code>", start=0, end=1, result_end=2, tool_call=call, tool_result=late),
        Turn(text="<code>x</code>", start=2, end=3, result_end=3, tool_call=call),
    ]
    blocks = list(viewer.trajectory_blocks(trajectory(turns, "")))
    assert [(b.label, b.text) for b in blocks[1::2]] == [
        ("Tool result: timeout, 5000 ms", "killed after 5 s"),
        ("Tool result", "(the call was not run)"),
    ]


# --- size -----------------------------------------------------------------------------------------------------------


def test_the_page_stays_small_however_much_a_run_holds(run_dir: Path) -> None:
    long = "<think>" + "&" * 300_000 + "</think>"
    turn = Turn(text=long + "<code></code>" * 5_000, start=0, end=9, result_end=9)
    many = [group(*(trajectory([turn], long, i) for i in range(2)), question="&" * 50_000) for _ in range(100)]
    write_log(run_dir / "samples/base.log", many)
    write_lines(run_dir / "synthesis/repairs.jsonl", [repair("&" * 30_000, "< " * 30_000, "q" * 9_000)] * 200)
    write_lines(run_dir / "grpo/metrics.jsonl", [{"step": s, "accuracy": 0.5, "x": s % 7} for s in range(20_000)])
    path = report.write_report(run_dir)
    assert path.stat().st_size < 12_000_000
    text = Page(path.read_text(encoding="utf-8")).text
    assert "The page shows 120 trajectories of those that were logged and 60 of 200 repairs; " in text
    assert "texts are cut at 8,000 characters." in text
    assert "characters left out" in text
    assert "more blocks" in text


def test_every_stage_gets_its_share_and_both_outcomes_come_first() -> None:
    def samples(stage: str, num_groups: int) -> StageSamples:
        one = group(*(solved(index=i) for i in range(4)), correct=(True, True, False, True))
        return StageSamples(stage=stage, groups=(one,) * num_groups)

    chosen = viewer.choose([samples("a", 50), samples("b", 1), samples("c", 50)], limit=24)
    assert [sum(stage == name for stage, _, _ in chosen) for name in "abc"] == [10, 4, 10]
    assert [index for stage, _, index in chosen if stage == "a"] == [0, 2] * 5
    assert [index for stage, _, index in chosen if stage == "b"] == [0, 1, 2, 3]
    assert viewer.choose([]) == []
