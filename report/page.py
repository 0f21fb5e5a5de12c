"""`report.html`: a run as one page that needs no other file, for a person to read or to show.

All text of a model is hostile. The template escapes everything (jinja2's autoescape), and invisible characters are spelled
out. No text becomes markup in the page's script. A content security policy with the hashes of the page's one style sheet and
one script keeps the browser from loading or running anything else, from the network or from the page.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from report import charts, curves, viewer
from report.data import Missing, ReportData, StageResult, Summary, SynthesisCounts, load_report
from report.text import (
    SPACE,
    count,
    decimal,
    listing,
    percent,
    seconds,
    short,
    signed,
    stage_name,
    verdict,
    visible,
    words,
)
from storage.whole import write_whole

PAGE = Path(__file__).parent / "assets"
FILE_NAME = "report.html"
MAX_STAGES = 12
MAX_REASONS = 12
PART_ORDER = ("outcome", "format", "trajectory", "overlong")


@dataclass(frozen=True, slots=True)
class PartTable:
    """The mean breakdown of the reward: a chart, its legend as (class, name) and the rows of its table."""

    svg: Markup
    legend: list[tuple[str, str]]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True, slots=True)
class SynthesisView:
    """The figures of stage 1, ready for the template."""

    tiles: list[tuple[str, str]]
    fates: Markup
    fates_legend: list[tuple[str, str]]
    dimensions: Markup
    dimension_rows: list[tuple[str, list[str]]]
    failed: Markup
    num_failed: str
    num_reasons_left_out: int


def write_report(run_dir: str | Path) -> Path:
    """Write `<run_dir>/report.html`, completely or not at all; returns its path.

    Raises FileNotFoundError if there is no such folder. The page says what else is missing.
    """
    target = Path(run_dir) / FILE_NAME
    write_whole(target, render_page(load_report(run_dir)))
    return target


def render_page(data: ReportData) -> str:
    """The page as text; a pure function of `data` and the files of `report_page/`."""
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (PAGE / "page.css").read_text(encoding="utf-8"), (PAGE / "page.js").read_text(encoding="utf-8")
    page: str = environment.get_template("page.html").render(
        # These two files are ours and not a model's. Neither holds a closing tag, which a test checks.
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
        **_header(data),
        **_stages(data.summary),
        **_training(data),
        synthesis=data.synthesis if isinstance(data.synthesis, Missing) else synthesis_view(data.synthesis),
        **_viewer(data),
    )
    return page


def content_policy(style: str, script: str) -> str:
    """The content security policy of the page: the browser may use its own style and script, nothing else."""
    allowed = {"style-src": _digest(style), "script-src": _digest(script)}
    sources = "; ".join(f"{name} 'sha256-{digest}'" for name, digest in allowed.items())
    return f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _header(data: ReportData) -> dict[str, Any]:
    summary = data.summary if isinstance(data.summary, Summary) else None
    facts = [
        ("run", visible(data.name)),
        ("model", visible(summary.model) if summary and summary.model else ""),
        ("finished", data.finished.strftime("%-d %B %Y, %H:%M UTC") if data.finished else ""),
        ("took", seconds(summary.total_seconds) if summary and summary.total_seconds is not None else ""),
        ("seed", str(summary.seed) if summary and summary.seed is not None else ""),
        *(("note", visible(note)) for note in data.notes),
    ]
    return {
        "title": f"{visible(data.name)} · AutoTraj run",
        "facts": [fact for fact in facts if fact[1]],
        "verdict": verdict(summary) if summary else "This run has no results yet.",
        "tiles": _tiles(summary) if summary and summary.stages else [],
    }


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """(value, name, remark) of each tile, which compares the last stage with the first."""
    first, last = summary.stages[0], summary.stages[-1]
    compared = len(summary.stages) > 1
    interval = f"± {100 * last.accuracy_ci95:.1f} (95{SPACE}%)" if last.accuracy_ci95 is not None else ""
    change = f"{signed(100 * (last.accuracy - first.accuracy), 1)} points"

    def since(value: str) -> str:
        return f"{value} before" if compared and value != "–" else ""

    return [
        (percent(last.accuracy), "accuracy", "; ".join(filter(None, [interval, change if compared else ""]))),
        (decimal(last.mean_reward), "mean reward", since(decimal(first.mean_reward))),
        (percent(last.tool_call_rate, 0), "call a tool", since(percent(first.tool_call_rate, 0))),
    ]


def _stages(summary: Summary | Missing) -> dict[str, Any]:
    if isinstance(summary, Missing) or not summary.stages:
        missing = summary if isinstance(summary, Missing) else Missing("No stage was evaluated in this run.")
        return {"stages": missing, "parts": missing, "total": ""}
    stages = summary.stages[:MAX_STAGES]
    return {
        "stages": [
            (
                stage_name(stage.name),
                _with_interval(percent(stage.accuracy), 100 * (stage.accuracy_ci95 or 0.0), 1),
                _with_interval(decimal(stage.mean_reward, 3), stage.mean_reward_ci95 or 0.0, 3),
                percent(stage.tool_call_rate, 0),
                count(stage.num_problems),
                seconds(stage.seconds),
            )
            for stage in stages
        ],
        "stages_left_out": len(summary.stages) - len(stages),
        "accuracy_chart": charts.interval_chart(
            [
                charts.Interval(
                    stage_name(s.name),
                    100 * s.accuracy,
                    None if s.accuracy_ci95 is None else 100 * s.accuracy_ci95,
                    percent(s.accuracy),
                )
                for s in stages
            ],
            label="Accuracy by stage, per cent: "
            + listing([f"{stage_name(s.name)} {percent(s.accuracy)}" for s in stages]),
            domain=(0.0, 100.0),
        ),
        "reward_chart": charts.interval_chart(
            [
                charts.Interval(stage_name(s.name), s.mean_reward, s.mean_reward_ci95, decimal(s.mean_reward, 3))
                for s in stages
                if s.mean_reward is not None
            ],
            label="Mean reward by stage: "
            + listing([f"{stage_name(s.name)} {decimal(s.mean_reward, 3)}" for s in stages]),
        ),
        "parts": part_table(stages),
        "total": seconds(summary.total_seconds) if summary.total_seconds is not None else "",
    }


def _with_interval(value: str, half_width: float, digits: int) -> str:
    return f"{value} ±{SPACE}{half_width:.{digits}f}" if half_width else value


def part_table(stages: Sequence[StageResult]) -> PartTable | Missing:
    """The breakdown of the reward for the stages that have one. Known parts come first, in their order."""
    having = [stage for stage in stages if stage.reward_parts]
    if not having:
        return Missing("No breakdown of the reward: summary.json has no reward_parts.")
    found = {name for stage in having for name in stage.reward_parts}
    names = [name for name in PART_ORDER if name in found] + sorted(found - set(PART_ORDER))
    names = names[:8]
    classes = [f"part{PART_ORDER.index(name) if name in PART_ORDER else 4}" for name in names]
    rows = [charts.BarGroup(stage_name(s.name), tuple(s.reward_parts.get(name) for name in names)) for s in having]
    return PartTable(
        svg=charts.stacked_chart(rows, classes, label="Mean reward by stage and part; the table has the figures"),
        legend=[(name, words(part)) for name, part in zip(classes, names, strict=True)],
        rows=[(row.label, [signed(v, 3) if v is not None else "–" for v in row.values]) for row in rows],
    )


def _training(data: ReportData) -> dict[str, Any]:
    grpo = data.grpo
    others, left_out = curves.other_plots({} if isinstance(grpo, Missing) else grpo, curves.GRPO)
    figures = data.reward_model_figures
    return {
        "grpo": grpo if isinstance(grpo, Missing) else curves.plots(grpo, curves.GRPO),
        "grpo_other": others,
        "grpo_left_out": left_out,
        "other_stages": [
            (stage_name(name), found if isinstance(found, Missing) else curves.other_plots(found, ())[0])
            for name, found in list(data.other_stages.items())[:MAX_STAGES]
        ],
        "sft": data.sft if isinstance(data.sft, Missing) else curves.plots(data.sft, curves.SFT),
        "reward_model": (
            data.reward_model
            if isinstance(data.reward_model, Missing)
            else curves.plots(data.reward_model, curves.REWARD_MODEL)
        ),
        "reward_model_figures": (
            figures if isinstance(figures, Missing) else [_figure(*pair) for pair in list(figures.items())[:16]]
        ),
    }


def _figure(name: str, value: float) -> tuple[str, str]:
    share = name.endswith(("accuracy", "rate"))
    whole = name.startswith("num_") or name.endswith("step")
    return words(name.removeprefix("num_")), percent(value) if share else count(value) if whole else short(value)


def synthesis_view(synthesis: SynthesisCounts) -> SynthesisView:
    """Counts, means before and after repair, and why attempts failed."""
    s = synthesis
    fates = [("kept", s.num_kept), ("repaired", s.num_repaired), ("hard cases", s.num_hard)]
    classes = ["fate0", "fate1", "fate2"]
    d = s.dimensions
    names = list(dict.fromkeys([*d.before, *d.after, *d.kept]))[:10]
    dimensions = [charts.BarGroup(words(n), (d.before.get(n), d.after.get(n), d.kept.get(n))) for n in names]
    reasons = sorted(s.failed_attempts.items(), key=lambda pair: (-pair[1], pair[0]))
    tiles = [
        (count(s.num_questions), "questions"),
        (count(s.num_candidates), "trajectories sampled"),
        (count(s.num_kept), "kept as they are"),
        (count(s.num_repaired), f"repaired, of {count(s.num_to_repair)} tried"),
        (count(s.num_hard), "hard cases"),
        *([(seconds(s.seconds), "took")] if s.seconds is not None else []),
    ]
    return SynthesisView(
        tiles=tiles,
        fates=charts.stacked_chart(
            [charts.BarGroup("trajectories", tuple(float(n) for _, n in fates))],
            classes,
            label="Trajectories: " + listing([f"{count(n)} {name}" for name, n in fates]),
        ),
        fates_legend=[(c, f"{name} ({count(n)})") for c, (name, n) in zip(classes, fates, strict=True)],
        dimensions=charts.dot_chart(
            dimensions,
            ["before", "after", "kept"],
            label="Mean quality by dimension, before and after repair and of what was kept; the table has the figures",
            domain=(0.0, 1.0),
        ),
        dimension_rows=[(row.label, [decimal(v, 3) for v in row.values]) for row in dimensions],
        failed=charts.bar_chart(
            [(words(name), n) for name, n in reasons[:MAX_REASONS]],
            label="Failed attempts: "
            + listing([f"{words(n)} {count(c)}" for n, c in reasons[:MAX_REASONS]] or ["none"]),
        ),
        num_failed=count(sum(s.failed_attempts.values())),
        num_reasons_left_out=max(0, len(reasons) - MAX_REASONS),
    )


def _viewer(data: ReportData) -> dict[str, Any]:
    samples = () if isinstance(data.samples, Missing) else data.samples
    repairs = None if isinstance(data.repairs, Missing) else data.repairs
    shown = viewer.items(samples, repairs)
    missing = [part.why for part in (data.samples, data.repairs) if isinstance(part, Missing)]
    return {
        "items": shown,
        "item_stages": list(dict.fromkeys(item.stage for item in shown)),
        "item_outcomes": [
            (outcome, text)
            for outcome, text in viewer.OUTCOME_WORDS.items()
            if any(item.outcome == outcome for item in shown)
        ],
        "viewer_missing": missing,
        "viewer_note": viewer.left_out(samples, repairs),
    }
