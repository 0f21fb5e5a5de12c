"""Two machines with one run at a URI: real processes, each with a disk of its own, on a real S3 API."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from object_store import Proxy, client, environment, objects, proxied, set_environment
from tiny_run import ROOT, tiny

from autotraj.config.run import to_toml
from autotraj.errors import UserError
from autotraj.run_folder.claim import CLAIMS, held
from autotraj.run_folder.location import RunLocation
from storage.objects import StorageError

pytestmark = pytest.mark.slow

BUCKET = "runs"
HOLDER = """
import sys
from autotraj.errors import UserError
from autotraj.run_folder.location import RunLocation
from autotraj.run_folder.claim import held
try:
    with held(RunLocation(sys.argv[1], retry_s=5), beat_s=0.2, silence_s=float(sys.argv[2])) as claim:
        print("held", flush=True)
        for word in sys.stdin:
            (location := RunLocation(sys.argv[1], retry_s=5)).path.joinpath(word.strip()).write_text("x")
            location.push()
            print("written", flush=True)
except UserError as error:
    print(f"refused: {error}", flush=True)
"""
LONG = 600.0


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with proxied(BUCKET) as made:
        yield made


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name.translate(str.maketrans(' []', '---'))}"


@pytest.fixture
def machine(proxy: Proxy, tmp_path: Path, run: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process on the machine of that name that works on the run."""
    with ExitStack() as stack:

        def start(name: str, silence_s: float = LONG) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", HOLDER, run, str(silence_s)],
                cwd=ROOT,
                env=os.environ | environment(proxy.address, tmp_path / name),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(end, process)
            return process

        yield start


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(30)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def writes(process: subprocess.Popen[str], word: str) -> str:
    """What it says after it was told to write a file of this name; empty if it ended."""
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return line(process)


def claims(proxy: Proxy, run: str) -> set[str]:
    return objects(proxy.address, BUCKET, f"{run.rpartition('/')[2]}/{CLAIMS}")


def here(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_environment(environment(proxy.address, tmp_path / name), monkeypatch.setenv)


@pytest.mark.parametrize("command", ["run", "grpo --resume"])
def test_a_second_machine_is_refused_and_told_who_holds_the_run(
    proxy: Proxy, tmp_path: Path, machine: Callable[..., subprocess.Popen[str]], run: str, command: str
) -> None:
    first = machine("one")
    assert line(first) == "held"
    file = tmp_path / "run.toml"
    file.write_text(to_toml(tiny(tmp_path, f"run_dir={run}")))
    words = ["grpo", "--resume", run] if command == "grpo --resume" else [command, "--config", str(file)]
    second = subprocess.run(
        [sys.executable, "-m", "autotraj", *words],
        cwd=ROOT,
        env=os.environ | environment(proxy.address, tmp_path / "two"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == 2, second.stderr
    assert f"error: run_dir: {run} is in use by process {first.pid} on {os.uname().nodename} (" in second.stderr
    assert "gave its last sign of life" in second.stderr
    assert "free once it has been silent for 300 s" in second.stderr
    assert len(claims(proxy, run)) == 1, "the one refused leaves nothing"
    assert writes(first, "log") == "written"


def test_a_claim_ends_with_its_block(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    for name in ("one", "two"):
        here(proxy, tmp_path, monkeypatch, name)
        with suppress(KeyboardInterrupt), held(RunLocation(run, retry_s=5)):
            assert len(claims(proxy, run)) == 1
            raise KeyboardInterrupt
    assert not claims(proxy, run)


def test_a_dead_holder_is_taken_over_at_once_on_its_machine_and_after_its_silence_on_another(
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: Callable[..., subprocess.Popen[str]],
    run: str,
) -> None:
    for _ in range(2):
        first = machine("one")
        assert line(first) == "held"
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        assert len(claims(proxy, run)) == 1
    here(proxy, tmp_path, monkeypatch, "two")
    with pytest.raises(UserError, match=f"is in use by process {first.pid} on"), held(RunLocation(run, retry_s=5)):
        pytest.fail("it was silent for a moment only")
    deadline = time.monotonic() + 60
    while (said := line(second := machine("two", 3.0))) != "held":
        assert said.startswith("refused: ")
        assert time.monotonic() < deadline
    assert len(claims(proxy, run)) == 1, "the dead one's is removed"
    assert writes(second, "own") == "written"


def test_beats_keep_a_claim_alive(
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: Callable[..., subprocess.Popen[str]],
    run: str,
) -> None:
    """Three times as long as its silence would be."""
    first = machine("one", 4.0)
    assert line(first) == "held"
    here(proxy, tmp_path, monkeypatch, "two")
    until = time.monotonic() + 12
    while time.monotonic() < until:
        with pytest.raises(UserError, match="is in use by"), held(RunLocation(run, retry_s=5), silence_s=4.0):
            pytest.fail("two hold it")
        time.sleep(0.5)


def test_one_that_was_paused_and_taken_over_writes_nothing_more(
    proxy: Proxy, machine: Callable[..., subprocess.Popen[str]], run: str
) -> None:
    first = machine("one", 3.0)
    assert line(first) == "held"
    assert writes(first, "before") == "written"
    first.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while (said := line(second := machine("two", 3.0))) != "held":
        assert said.startswith("refused: ")
        assert time.monotonic() < deadline
    first.send_signal(signal.SIGCONT)
    assert writes(first, "after") == ""
    assert first.wait(60) == 1
    assert first.stderr is not None
    assert f"was taken over by process {second.pid}" in first.stderr.read()
    assert writes(second, "own") == "written"
    names = objects(proxy.address, BUCKET, run.rpartition("/")[2])
    assert {name for name in names if not name.startswith(CLAIMS)} == {"before", "own"}
    assert len(claims(proxy, run)) == 1


def test_of_machines_that_start_at_once_never_two_get_in(
    machine: Callable[..., subprocess.Popen[str]], run: str
) -> None:
    """All may be refused; whoever gets in holds it while the others ask."""
    processes = [machine(str(number)) for number in range(4)]
    said = [line(process) for process in processes]
    assert said.count("held") <= 1
    assert all(text == "held" or text.startswith("refused: run_dir: ") for text in said)


def test_what_is_no_claim_of_ours_counts_as_one(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    here(proxy, tmp_path, monkeypatch, "one")
    key = f"{run.rpartition('/')[2]}/{CLAIMS}/other.json"
    client(proxy.address).put_object(Bucket=BUCKET, Key=key, Body=b"[]")
    with pytest.raises(UserError, match="is in use by process None on None"), held(RunLocation(run, retry_s=5)):
        pytest.fail("two hold it")


def test_storage_that_refuses_is_told_before_anything_is_started(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    here(proxy, tmp_path, monkeypatch, "one")
    proxy.refuses = lambda method, path, key: True
    try:
        with (
            pytest.raises(UserError, match=r"^run_dir: .*the credentials have expired"),
            held(RunLocation(run, retry_s=5)),
        ):
            pytest.fail("nothing can be written there")
    finally:
        proxy.refuses = lambda method, path, key: False


def test_a_claim_of_another_run_does_not_count(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    """Its name may begin with this one's."""
    here(proxy, tmp_path, monkeypatch, "one")
    with held(RunLocation(run, retry_s=5)):
        client(proxy.address).delete_object(
            Bucket=BUCKET, Key=f"{run.rpartition('/')[2]}/{CLAIMS}/{next(iter(claims(proxy, run)))}"
        )
        other = RunLocation(f"{run}-2", retry_s=5)
        other.path.mkdir(parents=True)
        (other.path / "file").write_text("x")
        other.push()
        stage = RunLocation(f"{run}/sft", retry_s=5)
        stage.path.mkdir(parents=True)
        (stage.path / "file").write_text("x")
        with pytest.raises(StorageError, match="was taken over"):
            stage.push()
