"""Checkpoints: whole or absent, pruned, with a full disk and without; the same on a local folder and at a URI."""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from object_store import Proxy, environment, objects, proxied, set_environment
from tiny_run import tiny

from autotraj.__main__ import main
from autotraj.cli import commands
from autotraj.errors import RunError, UserError
from autotraj.run_folder.folder import RunFolder, newest
from autotraj.run_folder.location import RunLocation
from autotraj.run_folder.trackers import TRACKERS, JSONLines
from autotraj.stages.resume import open_folder
from cluster.exit_codes import EXIT_FAILED
from learners.checkpoint_format import META_FILE
from storage.objects import Storage, files_of, scratch
from trajectory.log import RecordLog, read_records

pytestmark = pytest.mark.slow

BUCKET = "runs"
PART_BYTES = 1 << 20


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with proxied(BUCKET) as made:
        yield made


def save(folder: Path, learners: Path | Storage) -> None:
    """As the loop does: the driver's part, and a rank's."""
    (folder / "state").write_text("driver")
    content = {"weights": torch.zeros(PART_BYTES // 4)}
    if isinstance(learners, Path):
        learners.mkdir()
        torch.save(content, learners / "shard")
        (learners / META_FILE).write_text("{}")
        return
    with scratch() as mine:
        torch.save(content, mine / "shard")
        (mine / META_FILE).write_text("{}")
        learners.upload(mine, files_of(mine))


@pytest.mark.parametrize("at_uri", [False, True], ids=["local", "s3"])
def test_checkpoints_are_pruned_and_found_again(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_uri: bool
) -> None:
    set_environment(environment(proxy.address, tmp_path / "one"), monkeypatch.setenv)
    run_dir = f"s3://{BUCKET}/pruned" if at_uri else str(tmp_path / "run")
    config = tiny(tmp_path, f"run_dir={run_dir}")
    with RunFolder.create(config) as folder:
        for step in (1, 2, 3):
            folder.write_metrics(step, {"x": step})
            folder.checkpoint(step, save, keep=2)
        folder.write_metrics(4, {"x": 4})
    with pytest.raises(UserError, match=f"already holds checkpoints; continue it with --resume {run_dir}"):
        RunFolder.create(config)
    if at_uri:
        names = {name.split("/")[0] for name in objects(proxy.address, BUCKET, "pruned/checkpoints")}
        assert names == {"step-000002", "step-000002.json", "step-000003", "step-000003.json"}
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    else:
        assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-000002", "step-000003"]
    folder, resumed, checkpoint = RunFolder.resume(run_dir)
    with folder:
        assert resumed.model_dump() == config.model_dump()
        assert checkpoint.step == 3
        assert (checkpoint.folder / "state").read_text() == "driver"
        found = checkpoint.learners
        assert set(files_of(found) if isinstance(found, Path) else found.entries()) == {"shard", META_FILE}
        steps = [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3]  # the fourth will be taken again
        assert list((folder.path / "tensorboard").iterdir())


def test_a_checkpoint_that_fails_at_any_request_leaves_the_one_before(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused from the n-th changing request on, for every n until it passes."""
    set_environment(environment(proxy.address, tmp_path / "one"), monkeypatch.setenv)
    config = tiny(tmp_path, f"run_dir=s3://{BUCKET}/cut", "storage_retry_s=0")
    folder = RunFolder.create(config)
    folder.checkpoint(1, save, keep=1)
    location, errors = RunLocation.of(config), []
    for allowed in range(40):
        count = iter(range(1000))
        proxy.refuses = lambda method, path, key, c=count, n=allowed: method not in ("GET", "HEAD") and next(c) >= n
        folder.write_metrics(2, {"x": 1})
        try:
            folder.checkpoint(2, save, keep=1)
            break
        except RunError as error:
            errors.append(str(error))
        finally:
            proxy.refuses = lambda method, path, key: False
        found = newest(location)
        assert found is not None
        # Pruning comes after the marker: there may be two whole ones, never none.
        assert found.step in (1, 2)
        assert f"The last complete checkpoint is of step {found.step};" in errors[-1]
        assert "the credentials have expired" in errors[-1]
        assert isinstance(found.learners, Storage)
        assert set(found.learners.entries()) == {"shard", META_FILE}
    assert len(errors) >= 5
    found = newest(location)
    assert found is not None
    assert found.step == 2
    assert {name.split("/")[0] for name in objects(proxy.address, BUCKET, "cut/checkpoints")} == {
        "step-000002",
        "step-000002.json",
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True, timeout=30)


def test_expired_credentials_are_told_before_anything_is_started(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(environment(proxy.address, tmp_path / "one"), monkeypatch.setenv)
    proxy.refuses = lambda method, path, key: True
    try:
        for start in (
            lambda: RunFolder.create(tiny(tmp_path, f"run_dir=s3://{BUCKET}/refused")),
            lambda: RunFolder.resume(f"s3://{BUCKET}/refused"),
            lambda: open_folder(tiny(tmp_path, f"run_dir=s3://{BUCKET}/refused")),
        ):
            with pytest.raises(UserError, match=r"run_dir: s3://runs/refused: write .*the credentials have expired"):
                start()
    finally:
        proxy.refuses = lambda method, path, key: False


def until_full(write: Callable[[], object]) -> None:
    for _ in range(10_000):
        write()


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path, f'run_dir="{small_disk / "run"}"')
    folder = RunFolder.create(config)
    folder.checkpoint(1, save, keep=3)
    folder.checkpoint(2, save, keep=3)
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - PART_BYTES // 2))  # half a checkpoint fits
    with pytest.raises(RunError) as caught:
        folder.checkpoint(3, save, keep=3)
    said = str(caught.value)
    assert f"run_dir {small_disk / 'run'}: the checkpoint of step 3 could not be written: the disk of" in said
    assert "is full" in said
    assert (
        "The last complete checkpoint is of step 2. Then free some space and go on with python -m autotraj grpo" in said
    )
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    found = newest(folder.location)
    assert found is not None
    assert isinstance(found.learners, Path)
    assert torch.load(found.learners / "shard")["weights"].numel() == PART_BYTES // 4

    # Full to the last byte: metrics, too, come to an end that has a name, and nobody waits for room.
    with pytest.raises(OSError, match="No space left"), ballast.open("ab", buffering=0) as file:
        until_full(lambda: file.write(bytes(4096)))
    with pytest.raises(OSError, match="No space left") as full:
        until_full(lambda: folder.write_metrics(3, {f"metric/{i}": 1.0 for i in range(50)}))
    assert full.value.errno == errno.ENOSPC
    folder.__exit__(OSError, full.value, None)

    ballast.unlink()
    resumed, _, checkpoint = RunFolder.resume(str(small_disk / "run"))
    assert checkpoint.step == 2
    resumed.checkpoint(3, save, keep=1)


def test_a_trajectory_log_on_a_full_disk(small_disk: Path) -> None:
    log = RecordLog(small_disk / "log")
    with pytest.raises(OSError, match=r"no room for 300008 bytes more|No space left") as full:
        until_full(lambda: log.append_bytes(bytes(300_000)))
    assert full.value.errno == errno.ENOSPC
    assert {len(record) for record in read_records(small_disk / "log")} == {300_000}


def test_the_command_line_names_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_disk: Path
) -> None:
    def fill(*_: object) -> int:
        (small_disk / "big").write_bytes(bytes(7 << 20))
        return 0

    monkeypatch.setattr(commands, "report", fill)
    assert main(["report", "x"]) == EXIT_FAILED
    said = capsys.readouterr().err
    assert "failed: the disk is full:" in said
    assert "grpo` with --resume" in said


def test_a_line_that_was_cut_short_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    lines = JSONLines(tmp_path)
    lines.forget_after(2)
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


class Remembered:
    """A tracker of one's own: it keeps what it is told of a folder."""

    def __init__(self, told: list[tuple[object, ...]]) -> None:
        self._told = told

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._told.append(("write", step, dict(metrics)))

    def forget_after(self, step: int) -> None:
        self._told.append(("forget", step))

    def close(self) -> None:
        self._told.append(("close",))


def test_a_tracker_of_ones_own_is_told_what_the_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From outside: a run writes to it, sets it back with the others, and closes it, also when it fails."""
    told: list[tuple[object, ...]] = []
    monkeypatch.setitem(TRACKERS, "remembered", lambda folder: Remembered(told))
    with RunFolder.create(tiny(tmp_path)) as folder:
        folder.write_metrics(1, {"x": 1.0})
        folder.checkpoint(1, save, keep=1)
        folder.write_metrics(2, {"x": 2.0})
        folder.set_back(newest(folder.location))
    assert told == [("forget", 0), ("write", 1, {"x": 1.0}), ("write", 2, {"x": 2.0}), ("forget", 1), ("close",)]
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 1
    told.clear()
    resumed, _, _ = RunFolder.resume(str(folder.path))
    with pytest.raises(RunError, match="as asked"), resumed:
        raise RunError("as asked")
    assert told == [("forget", 1), ("close",)]


@pytest.mark.parametrize("text", ["model = ", "no_such_key = 1\n"])
def test_a_damaged_configuration_of_the_run_itself_is_named(tmp_path: Path, text: str) -> None:
    config = tiny(tmp_path)
    open_folder(config)
    file = Path(config.run_dir) / "config.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"config\.toml, in which the run keeps its own configuration") as caught:
        open_folder(config)
    assert "--config" not in str(caught.value)
