"""What a run goes on from: its newest checkpoint by number, and logs without the groups that were undone."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import Proxy, environment, proxied, set_environment
from small_group import GROUP
from tensorboardX.proto.event_pb2 import Event
from tiny_run import tiny

from autotraj.run_folder.folder import LOGS, RunFolder, latest_checkpoint, newest
from learners.checkpoint_format import META_FILE
from storage.locations import is_uri
from storage.objects import Storage
from trajectory.log import TrajectoryLog, read_log
from trajectory.types import Group

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with proxied("runs") as made:
        yield made


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a test's run goes."""
    if request.param == "local":
        return str(tmp_path / "run")
    proxy: Proxy = request.getfixturevalue("proxy")
    set_environment(environment(proxy.address, tmp_path / "one"), monkeypatch.setenv)
    return f"s3://runs/{request.node.originalname}"


def save(folder: Path, learners: Path | Storage) -> None:
    (folder / "state").write_text("driver")
    if isinstance(learners, Path):
        learners.mkdir()
        (learners / META_FILE).write_text("{}")
    else:
        learners.write(META_FILE, b"{}")


def group(lease_id: str) -> Group:
    return Group(lease_id=lease_id, task=GROUP.task, trajectories=GROUP.trajectories)


def leases(folder: RunFolder) -> list[str]:
    return [logged.lease_id for logged in read_log(folder.trajectory_log)]


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(place: str, tmp_path: Path) -> None:
    """Seven digits come after six, and what a person put there is no checkpoint and stays."""
    config = tiny(tmp_path, f"run_dir={place}")
    with RunFolder.create(config) as folder:
        own = folder.path / "checkpoints/step-999900.copy"
        own.mkdir(parents=True)
        for step in (999_900, 999_950, 1_000_000):
            folder.checkpoint(step, save, keep=2)
            found = newest(folder.location)
            assert found is not None
            assert found.step == step
    resumed, _, checkpoint = RunFolder.resume(config.run_dir)
    with resumed:
        assert checkpoint.step == 1_000_000
        resumed.checkpoint(1_000_050, save, keep=2)
        found = newest(resumed.location)
        assert found is not None
        assert found.step == 1_000_050
    if not is_uri(place):
        kept = {path.name for path in (folder.path / "checkpoints").iterdir()}
        assert kept == {"step-1000000", "step-1000050", "step-999900.copy"}
        latest = latest_checkpoint(folder.path)
        assert latest is not None
        assert latest.name == "step-1000050"


def test_undone_groups_leave_the_logs(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners lost after the checkpoint, then the driver: each time the leases of what was undone are given out again."""
    config = tiny(tmp_path, f"run_dir={place}")
    with RunFolder.create(config) as folder:
        pairs = folder.path / LOGS[1]
        pairs.parent.mkdir()
        log = TrajectoryLog(folder.trajectory_log)
        log.append(group("0-7-1"))
        folder.set_back(None)  # no checkpoint yet
        log.append(group("0-3-1"))
        pairs.write_text("first\n")
        folder.checkpoint(1, save, keep=2)
        log.append(group("0-5-1"))
        with pairs.open("a", buffering=1) as file:
            file.write("undone\n")
            checkpoint = newest(folder.location)
            folder.set_back(checkpoint)
            file.write("second\n")
        assert leases(folder) == ["0-3-1"]
        log.append(group("0-5-1"))  # the same writer goes on behind
        assert leases(folder) == ["0-3-1", "0-5-1"]
        assert pairs.read_text() == "first\nsecond\n"
        log.close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    resumed, _, _ = RunFolder.resume(config.run_dir)
    with resumed:
        assert leases(resumed) == ["0-3-1"]
        assert (resumed.path / LOGS[1]).read_text() == "first\n"


def test_a_run_that_ended_before_its_first_checkpoint_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    for attempt in range(2):
        with RunFolder.create(tiny(tmp_path)) as folder:
            folder.write_metrics(1, {"attempt": attempt})
            log = TrajectoryLog(folder.trajectory_log)
            log.append(group("0-7-1"))
            log.close()
            assert leases(folder) == ["0-7-1"]
            assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 1


def test_tensorboard_is_told_which_steps_are_taken_again(tmp_path: Path) -> None:
    """By its own mark of a restart: it leaves out what stands before it of that step and later ones."""
    with RunFolder.create(tiny(tmp_path)) as folder:
        folder.write_metrics(1, {"x": 1.0})
        folder.checkpoint(1, save, keep=1)
        folder.write_metrics(2, {"x": 2.0})
        folder.set_back(newest(folder.location))
        folder.write_metrics(2, {"x": 3.0})
    (written,) = (folder.path / "tensorboard").iterdir()
    events = list(events_of(written.read_bytes()))
    shown = [(event.step, "restart" if event.HasField("session_log") else "values") for event in events]
    assert shown == [(0, "values"), (1, "restart"), (1, "values"), (2, "values"), (2, "restart"), (2, "values")]


def events_of(data: bytes) -> Iterator[Event]:
    """Of a TFRecord file: length, its checksum, the event, its checksum."""
    while data:
        (length,) = struct.unpack_from("<Q", data)
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
