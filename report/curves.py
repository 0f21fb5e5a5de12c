"""The metrics that a report draws, with their titles and forms. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from markupsafe import Markup

from report.charts import line_chart
from report.data import Metrics, Series
from report.text import count, percent, short, visible

MAX_OTHER = 40
"""Most metrics without an entry below that are drawn."""

Kind = Literal["share", "number", "log"]


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric with a chart. The first of `names` that the run has is drawn."""

    title: str
    names: tuple[str, ...]
    kind: Kind = "number"
    hint: str = ""
    smooth: bool = True


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart with its heading."""

    title: str
    hint: str
    first: str
    last: str
    svg: Markup


GRPO = (
    Curve("Reward", ("reward_mean",), hint="mean of the step's trajectories"),
    Curve("Accuracy", ("accuracy",), "share", "on training problems, sampled"),
    Curve("Tool-call rate", ("tool_call_rate",), "share", "trajectories with at least one call"),
    Curve("Well-formed", ("format_rate",), "share", "trajectories that follow the format"),
    Curve("Reward model's part", ("reward/trajectory",), hint="mean contribution to the reward"),
    Curve("Staleness", ("staleness_mean",), hint="policy versions behind the learner"),
    Curve("Tokens a second", ("tokens_per_second",), hint="generated, while training goes on"),
    Curve("Tokens a trajectory", ("generated_tokens_mean",), hint="written by the model"),
    Curve(
        "Gate", ("sync/logprob_diff_mean", "gate_max_delta"), "log", "|Δ logprob| of engine and learner, nats a token"
    ),
    Curve("Weights that a step changes", ("sync/changed_share",), "share", "entries, in the engines' dtype"),
    Curve("KL to the reference", ("learner/kl_ref", "learner/kl"), hint="nats a token"),
    Curve("KL, learner to engine", ("learner/engine_kl",), hint="nats a token; 0 is on-policy"),
    Curve("Entropy", ("learner/entropy",), hint="nats a token"),
    Curve("Groups without variance", ("groups_no_variance",), hint="of a step; they carry no gradient"),
    Curve("Gradient norm", ("learner/grad_norm",)),
    Curve("Seconds a step", ("step_seconds",)),
)

SFT = (
    Curve("Loss", ("loss", "learner/loss", "train_loss"), hint="next token, on the model's own tokens"),
    Curve("Held-out loss", ("held_out/loss", "eval_loss")),
    Curve("Learning rate", ("lr", "learner/lr"), smooth=False),
    Curve("Gradient norm", ("grad_norm", "learner/grad_norm")),
)

REWARD_MODEL = (
    Curve("Loss", ("loss", "learner/loss", "train_loss"), hint="Bradley–Terry, a pair"),
    Curve("Pair accuracy", ("accuracy", "learner/accuracy", "pair_accuracy"), "share", "of the step's pairs"),
    Curve("Held-out pair accuracy", ("held_out/accuracy", "eval_accuracy"), "share", "pairs of questions kept apart"),
    Curve("Margin", ("margin_mean", "learner/margin_mean"), hint="score of the repair minus its original's"),
    Curve("Held-out margin", ("held_out/margin_mean",)),
)


def plots(metrics: Metrics, curves: Sequence[Curve]) -> list[Plot]:
    """The charts of those `curves` for which the run has a metric."""
    found = [(curve, next((metrics[name] for name in curve.names if name in metrics), None)) for curve in curves]
    return [plot for curve, series in found if series and (plot := _plot(curve, series)).svg]


def other_plots(metrics: Metrics, curves: Sequence[Curve]) -> tuple[list[Plot], int]:
    """Charts of at most `MAX_OTHER` metrics that no curve names and that change, and the number of those left out."""
    named = set(chain.from_iterable(curve.names for curve in curves))
    rest = [name for name in sorted(metrics) if name not in named and len(set(metrics[name].values)) > 1]
    shown = [_plot(Curve(visible(name)[:60], (name,)), metrics[name]) for name in rest[:MAX_OTHER]]
    return shown, max(0, len(rest) - MAX_OTHER)


def _plot(curve: Curve, series: Series) -> Plot:
    def layout(value: float) -> str:
        return percent(value) if curve.kind == "share" else short(value)

    first, last = layout(series.values[0]), layout(series.values[-1])
    svg = line_chart(
        series.steps,
        series.values,
        label=f"{curve.title}: {first} at step {count(series.steps[0])}, {last} at step {count(series.steps[-1])}",
        domain=(0.0, 1.0) if curve.kind == "share" else None,
        log=curve.kind == "log",
        window=len(series.values) // 12 if curve.smooth else 1,
        layout=(lambda value: percent(value, 0)) if curve.kind == "share" else short,
    )
    return Plot(curve.title, curve.hint, first, last, svg)
