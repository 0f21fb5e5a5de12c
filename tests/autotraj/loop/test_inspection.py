"""Who waits on whom, by hand; the metrics' arithmetic; the dashboard's queries against what is declared."""

import io
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from scrape import DASHBOARD, METRIC, labels_of, queries

from actors import metrics as engine_metrics
from autotraj.config.run import load
from autotraj.errors import UserError
from autotraj.gateways import metrics as gateway_metrics
from autotraj.gateways import node
from autotraj.loop.inspection import announce
from autotraj.runners.calls import PendingCall, RunnerRecord, views
from autotraj.status import prometheus, sandbox
from autotraj.status.board import StatusBoard
from autotraj.status.progress import GrpoProgress
from autotraj.status.rows import (
    LoopState,
    RunnerState,
    RunnerView,
    Since,
    StatusRow,
    loop_rows,
    render_status,
    runner_rows,
)
from autotraj.status.show import show
from tool_sandbox.stats import PoolState, Stats


def runner(runner_id: int, state: RunnerState = "ready", *, probed: bool = False, **work: int) -> RunnerView:
    return RunnerView(runner_id=runner_id, state=state, policy_version=3, work=work, probed=probed, oldest_s=7.0)


LOOP = LoopState(
    step=3,
    groups_per_step=16,
    max_staleness=1,
    num_buffered=5,
    num_scoring=0,
    num_admissible=2,
    learners_up=True,
    trains=False,
    broadcasts=False,
    uses_reward_model=False,
    num_repairs=None,
    runners=(runner(1, rollout_group=4), runner(2)),
)


def row_of(rows: list[StatusRow], who: str) -> StatusRow:
    (found,) = [row for row in rows if row.who == who]
    return found


def test_learners_wait_for_the_actors_that_sample() -> None:
    row = row_of(loop_rows(LOOP), "learners")
    assert (row.does, row.waits_on, row.detail) == ("wait", "rollout actor 1", "5 of 16 groups are scored")
    assert row_of(loop_rows(replace(LOOP, learners_up=False)), "learners").does == "start"
    few = loop_rows(replace(LOOP, runners=tuple(runner(i, rollout_group=1) for i in (1, 2))))
    assert row_of(few, "learners").waits_on == "rollout actors 1, 2"
    many = loop_rows(replace(LOOP, runners=tuple(runner(i, rollout_group=1) for i in range(500))))
    assert row_of(many, "learners").waits_on == "500 rollout actors"


@pytest.mark.parametrize(
    ("changes", "waits_on"),
    [
        ({"num_scoring": 2, "runners": (runner(1),)}, "scoring"),
        ({"runners": (runner(1, "starting"), runner(2, "down"))}, "an engine to be ready"),
        ({"runners": (runner(1),)}, "the controller to hand out groups"),
    ],
)
def test_what_learners_wait_on(changes: dict[str, object], waits_on: str) -> None:
    assert row_of(loop_rows(replace(LOOP, **changes)), "learners").waits_on == waits_on  # type: ignore[arg-type]


def test_learners_that_wait_say_what_was_lost() -> None:
    lost = replace(LOOP, num_buffered=2, dropped=Counter(no_variance=13, stale=1), handed_back=Counter(episode_error=3))
    assert row_of(loop_rows(lost), "learners").detail == (
        "2 of 16 groups are scored, 14 dropped since the last step (mostly no_variance: 13), 3 handed back since the last "
        "step (episode_error)"
    )


def test_an_idle_actor_waits_for_the_learners_when_staleness_is_at_its_bound() -> None:
    rows = loop_rows(replace(LOOP, trains=True, num_admissible=0))
    assert row_of(rows, "learners") == StatusRow(who="learners", does="train", detail="step 4")
    assert row_of(rows, "rollout actor 2").waits_on == "the learners: max_staleness = 1 lets no further group start"
    assert row_of(loop_rows(LOOP), "rollout actor 2").waits_on == "the controller"


def test_actors_by_state() -> None:
    rows = runner_rows(
        [
            runner(1, rollout_group=4, repair=1),
            runner(2, "starting"),
            runner(3, "syncing", rollout_group=2),
            runner(4, "syncing", probed=True),
            runner(5, "down"),
            runner(6, "draining", rollout_group=1),
        ]
    )
    assert [(r.does, r.waits_on) for r in rows] == [
        ("repairs and samples", ""),
        ("starts", "its engine"),
        ("takes weights", "its weights"),
        ("takes weights", "the logprob gate"),
        ("down", "Ray to start it again"),
        ("leaves", "its last groups"),
    ]
    assert rows[0].detail == "1 request, 4 groups, the oldest for 7 s"


def test_scoring_and_repair() -> None:
    rows = loop_rows(replace(LOOP, num_scoring=3, uses_reward_model=True, num_repairs=1))
    assert row_of(rows, "scoring") == StatusRow(
        who="scoring", does="scores", waits_on="the reward model", detail="3 groups"
    )
    assert row_of(rows, "online repair") == StatusRow(who="online repair", does="repairs", detail="1 group")


def test_a_gateway_s_occupancy() -> None:
    stats = Stats(
        uptime_s=9.0, draining=False, running=70, calls={}, call_seconds={}, queue_seconds={}, containers_started=3,
        containers_died=1, containers_recycled={"calls": 2},
        pool=PoolState(queue=67, slots_free=1, slots_taken=3, containers={"serving": 2}),
    )  # fmt: skip
    told = {(name, *tags.values()): value for name, tags, value in gateway_metrics.values(stats)}
    assert told == {
        ("sandbox_slots", "free"): 1, ("sandbox_slots", "taken"): 3, ("sandbox_queue_length",): 67,
        ("sandbox_containers", "serving"): 2, ("sandbox_containers", "starting"): 0,
        ("sandbox_containers", "retiring"): 0,
        ("sandbox_containers_lost", "died"): 1, ("sandbox_containers_lost", "calls"): 2,
    }  # fmt: skip
    busy = StatusRow(who="sandbox h:1", does="runs calls", detail="3 of 4 places taken, 67 calls wait for one")
    assert sandbox.row("h:1", stats) == busy
    assert sandbox.row("h:1", None).does == "silent"


def test_a_gateway_is_not_silent_while_the_one_who_asks_it_is_stopped() -> None:
    asks = [(2.0, True), (600.0, False), (2.0, True), (2.0, False), (7.0, False), (90_000.0, False)]
    silent_s, told = 0.0, []
    for since_s, answered in asks:  # the second and the last question span a suspended laptop's night
        silent_s = gateway_metrics.silence(silent_s, since_s, answered=answered)
        told.append(silent_s)
    assert told == [0.0, 7.0, 0.0, 2.0, 9.0, 16.0]
    assert max(told) < node.HUNG_AFTER_S


def test_a_view_counts_a_runner_s_own_calls() -> None:
    calls = [
        PendingCall("work", 1, 0.0, method="rollout_group", started=10.0),
        PendingCall("work", 1, 0.0, method="rollout_group", started=14.0),
        PendingCall("probe", 1, 0.0, started=15.0),
        PendingCall("work", 2, 0.0, method="rollout_group", started=1.0),
    ]
    pool = {1: RunnerRecord(1.0, state="syncing", policy_version=2), 2: RunnerRecord(1.0), 3: RunnerRecord(1.0)}
    seen, other, idle = views(pool, calls, now=20.0)
    assert (seen.work, seen.probed, seen.oldest_s, seen.policy_version) == ({"rollout_group": 2}, True, 10.0, 2)
    assert (other.runner_id, other.work, other.probed, other.oldest_s) == (2, {"rollout_group": 1}, False, 19.0)
    assert (idle.runner_id, idle.work, idle.oldest_s) == (3, {}, 0.0)


def test_since_counts_from_the_last_change() -> None:
    since = Since()
    waits, trains = StatusRow(who="learners", does="wait", waits_on="scoring"), StatusRow(who="learners", does="train")
    assert since.seconds([waits], 10.0) == [0.0]
    assert since.seconds([replace(waits, detail="6 of 16")], 13.0) == [3.0]  # the detail may change
    assert since.seconds([trains], 14.0) == [0.0]
    assert since.seconds([trains], 15.5) == [1.5]
    assert since.seconds([], 16.0) == []
    assert since.seconds([trains], 17.0) == [0.0]  # it had been gone


def test_a_status_says_how_old_it_is() -> None:
    status = {
        "time": 1000.0, "pid": 7, "host": "head", "run_dir": "runs/x", "title": "GRPO", "doing": "trains", "doing_s": 5.0,
        "rows": [{"who": "learners", "does": "wait", "waits_on": "scoring", "detail": "5 of 16", "since_s": 2.0}],
    }  # fmt: skip
    lines = render_status(status, now=1003.0).splitlines()
    assert lines[0] == "runs/x: GRPO; trains for 8 s"
    assert lines[-1].split() == ["learners", "wait", "5", "s", "scoring", "5", "of", "16"]
    assert "NO REPORT" not in render_status(status, now=1003.0)
    assert "NO REPORT SINCE: the controller is busy (trains)" in render_status(status, now=1060.0)
    assert "THE RUN IS GONE" in render_status(status, now=1003.0, gone=True)
    ended = render_status(status | {"doing": "ended", "rows": []}, now=1060.0)
    assert ended.splitlines()[0] == "runs/x: GRPO; ended 65 s ago"
    assert "NO REPORT" not in ended


def test_a_board_is_read_back_and_says_what_became_of_its_run(tmp_path: Path) -> None:
    board = StatusBoard(
        tmp_path / "run" / "grpo", rows=lambda: [StatusRow(who="learners", does="train")], title=lambda: "GRPO"
    )
    with board.doing("writes a checkpoint"):
        assert "GRPO; writes a checkpoint for 0 s" in show(str(tmp_path / "run"))  # found in the stage's folder
    assert "learners" in show(str(tmp_path / "run"))
    board.close()
    ended = show(str(tmp_path / "run" / "grpo"))
    assert "ended" in ended
    assert "learners" not in ended


def test_a_killed_run_is_said_to_be_gone(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from autotraj.status.board import StatusBoard\n"
        "StatusBoard(Path(sys.argv[1]), rows=list, title=lambda: 'GRPO').write(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(DASHBOARD.parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=120, check=False)
    assert "THE RUN IS GONE" in show(str(tmp_path))


def test_a_run_at_a_uri_has_its_first_word_in_its_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = DASHBOARD.parents[1] / "examples/tiny"
    announce(load(base / "grpo.toml", [f'model="{base / "base"}"', 'run_dir="s3://bucket/runs/x"']))
    assert "waits for Ray" in show("s3://bucket/runs/x")
    assert os.listdir() == ["cache"]


def test_status_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no status.json there"):
        show(str(tmp_path))


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(UserError, match=r"^RAY_ADDRESS: nothing answers at [\d.]+:\d+ within 5 s"):
            show(None)


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board = StatusBoard(tmp_path, rows=list, title=lambda: "GRPO")
    (tmp_path / "status.json").mkdir()  # root writes everywhere, but not to a folder
    board.write()
    assert "can't be written" in caplog.text


@pytest.mark.parametrize(("terminal", "shown"), [(False, [1, 10, 20, 24]), (True, list(range(13, 25)))])
def test_progress_shows_the_last_steps_on_a_terminal_and_some_of_them_elsewhere(
    terminal: bool, shown: list[int]
) -> None:
    out = io.StringIO()
    with GrpoProgress(24, Console(file=out, force_terminal=terminal, width=110)) as progress:
        for step in range(1, 25):
            progress.grpo_step(step, {"reward_mean": 0.5})
    last_drawn = out.getvalue().rpartition("reward")[2]
    assert [int(line.split()[0]) for line in last_drawn.splitlines() if "0.50" in line] == shown


def test_a_step_s_seconds_add_up() -> None:
    metrics = {
        "step_seconds": 10.0,
        "train_seconds": 6.0,
        "learner/seconds/gradients": 4.0,
        "learner/seconds/pack": 0.5,
    }
    phases = prometheus.learner_seconds(metrics)
    assert phases == {
        "wait for groups": 4.0, "pack": 0.5, "logprobs": 0.0, "gradients": 4.0, "optimizer": 0.0, "publish": 0.0,
        "other": 1.5,
    }  # fmt: skip
    assert sum(phases.values()) == metrics["step_seconds"]


def test_gauges_of_a_step() -> None:
    found = prometheus.gauges({"accuracy": 0.5, "reward/format": 0.1, "dropped/stale": 2.0, "unheard_of": 1.0})
    assert found == [
        ("accuracy", {}, 0.5), ("reward", {"part": "format"}, 0.1), ("dropped_groups", {"reason": "stale"}, 2.0)
    ]  # fmt: skip


def test_every_gauge_that_is_set_is_declared_with_its_tags() -> None:
    targets = [*prometheus.BY_NAME.values(), *((g, {tag: ""}) for g, tag in prometheus.BY_PREFIX.values())]
    for gauge, tags in targets:
        assert tuple(tags) == prometheus.GAUGES[gauge][1], gauge


def declared() -> set[str]:
    """Every series name that the three exporters declare, as Ray renames it."""
    gauges = {*prometheus.GAUGES, *engine_metrics.GAUGES, *gateway_metrics.GAUGES}
    counters = {*engine_metrics.COUNTERS, "learner_seconds", "trained_groups"}
    histograms = {"staleness_versions", "tool_seconds", "tool_queue_seconds", "engine_update_seconds"}
    names = gauges | {f"{c}_total" for c in counters}
    names |= {f"{h}_{part}" for h in histograms for part in ("bucket", "sum", "count")}
    return {f"ray_autotraj_{name}" for name in names}


def test_the_dashboard_asks_only_for_what_is_declared() -> None:
    asked = {name for panel in queries().values() for query in panel for name in METRIC.findall(query)}
    assert asked <= declared()
    assert len(queries()) >= 20


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    cells = [
        (p["gridPos"]["x"] + i, p["gridPos"]["y"] + j)
        for p in panels for i in range(p["gridPos"]["w"]) for j in range(p["gridPos"]["h"])
    ]  # fmt: skip
    assert len(set(cells)) == len(cells)  # no panel lies on another
    assert {v["name"] for v in dashboard["templating"]["list"]} == {"datasource", "session"}
    for panel in panels:
        for target in panel.get("targets", []):
            assert 'SessionName=~"$session"' in target["expr"]
            assert labels_of(target["expr"], target["legendFormat"]) <= labels_of(target["expr"], "")
