"""The file through which the engines of a node get weights: real processes, a real small file system in memory."""

import fcntl
import logging
import multiprocessing
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actors.engine import host_weights
from actors.engine.protocol import EngineError, EngineTimeout, NoRoom

MIB = 1 << 20
SPAWN = multiprocessing.get_context("spawn")


def payload_of(num_mib: int, value: float = 1.0) -> dict[str, tuple[NDArray[Any], str]]:
    return {f"layer.{i}": (np.full(MIB // 4, value + i, np.float32), "float32") for i in range(num_mib)}


def values_in(path: Path) -> list[float]:
    return [float(tensor[-1]) for _, tensor in host_weights.read(str(path))]


def only_at(place: Path) -> None:
    """Lets this process have weights nowhere else."""
    host_weights.SHARED_MEMORY = place
    tempfile.tempdir = str(place)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_weights, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def small_memory(place: Path) -> Iterator[Path]:
    """24 MiB of memory as a file system, where no weights can go elsewhere."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this test mounts a tmpfs, which is not allowed here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def engine_of_a_node(place: Path, publication: str, together: Any, answers: Any) -> None:
    """In a process of its own: takes the weights, and gives them up when all others have them, too."""
    only_at(place)
    together.wait(60)
    try:
        shared = host_weights.share(publication, payload_of(16), timeout_s=60)
        together.wait(60)
        answers.put((shared.path.stat().st_ino, values_in(shared.path)))
        shared.release()
    except Exception as error:
        answers.put(repr(error))
        together.abort()


def test_four_engines_of_a_node_share_one_file_where_two_would_not_fit(small_memory: Path) -> None:
    together, answers = SPAWN.Barrier(4), SPAWN.Queue()
    engines = [
        SPAWN.Process(target=engine_of_a_node, args=(small_memory, "step1", together, answers)) for _ in range(4)
    ]
    for engine in engines:
        engine.start()
    got = [answers.get(timeout=120) for _ in engines]
    for engine in engines:
        engine.join(60)
    assert all(answer == got[0] for answer in got), got
    assert sorted(got[0][1]) == [1.0 + i for i in range(16)]
    assert not [path for path in small_memory.rglob("*") if path.is_file()]


def killed_half_way(place: Path, publication: str) -> None:
    """In a process of its own: writes, and dies after half of the tensors."""
    only_at(place)
    whole = host_weights._fill

    def half(path: Path, header: bytes, arrays: Iterator[NDArray[Any]]) -> None:
        def until_half() -> Iterator[NDArray[Any]]:
            for i, array in enumerate(arrays):
                if i == 8:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield array

        whole(path, header, until_half())

    host_weights._fill = half
    host_weights.share(publication, payload_of(16, value=7.0), timeout_s=10)


def test_nobody_reads_the_file_of_a_writer_that_was_killed_half_way(small_memory: Path) -> None:
    writer = SPAWN.Process(target=killed_half_way, args=(small_memory, "step1"))
    writer.start()
    writer.join(120)
    assert writer.exitcode == -signal.SIGKILL
    (partial,) = [path for path in small_memory.rglob("*") if path.is_file()]
    assert partial.name == "step1.partial"
    assert partial.stat().st_blocks * 512 >= 16 * MIB  # the whole space was reserved
    shared = host_weights.share("step1", payload_of(16), timeout_s=0.0)
    assert sorted(values_in(shared.path)) == [1.0 + i for i in range(16)]
    assert not partial.exists()
    shared.release()


def test_another_version_gets_the_space_of_a_dead_writer(small_memory: Path) -> None:
    writer = SPAWN.Process(target=killed_half_way, args=(small_memory, "step1"))
    writer.start()
    writer.join(120)
    assert writer.exitcode == -signal.SIGKILL
    host_weights.share("step2", payload_of(16), timeout_s=0.0).release()
    assert not [path for path in small_memory.rglob("*") if path.is_file()]


def test_a_lack_of_space_is_named_before_anything_is_written(small_memory: Path) -> None:
    with pytest.raises(NoRoom, match=r"need 0\.0313 GiB .* has 0\.0234 GiB free: .*--shm-size"):
        host_weights.share("step1", payload_of(32), timeout_s=60)
    assert not [path for path in small_memory.rglob("*") if path.is_file()]


def test_a_version_waits_for_the_space_of_one_that_is_still_read(small_memory: Path) -> None:
    old = host_weights.share("step1", payload_of(16), timeout_s=0.0)
    with pytest.raises(EngineTimeout, match=r"within 0 s.*beside .*step1\.safetensors"):
        host_weights.share("step2", payload_of(16, value=2.0), timeout_s=0.0)
    taken: queue.Queue[host_weights.SharedWeights] = queue.Queue()
    thread = threading.Thread(
        target=lambda: taken.put(host_weights.share("step2", payload_of(16, value=2.0), timeout_s=60))
    )
    thread.start()
    with pytest.raises(queue.Empty):
        taken.get(timeout=5 * host_weights.POLL_S)
    old.release()
    new = taken.get(timeout=60)
    thread.join()
    assert sorted(values_in(new.path)) == [2.0 + i for i in range(16)]
    new.release()


def test_the_space_of_a_removed_file_is_waited_for(small_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_weights, "SETTLING_S", 60.0)
    old = host_weights.share("step1", payload_of(16), timeout_s=0.0)
    reader = old.path.open("rb")
    old.release()
    with pytest.raises(NoRoom):  # removed, but not closed by all
        host_weights.share("step2", payload_of(16), timeout_s=0.0)
    taken: queue.Queue[host_weights.SharedWeights] = queue.Queue()
    thread = threading.Thread(target=lambda: taken.put(host_weights.share("step2", payload_of(16), timeout_s=60)))
    thread.start()
    with pytest.raises(queue.Empty):
        taken.get(timeout=5 * host_weights.POLL_S)
    reader.close()
    taken.get(timeout=60).release()
    thread.join()


def test_weights_without_room_in_shared_memory_go_to_the_temporary_folder_with_a_warning(
    small_memory: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path_factory.mktemp("disk")
    tempfile.tempdir = str(elsewhere)  # the fixture `place` sets it back
    with caplog.at_level(logging.WARNING):
        first = host_weights.share("step1", payload_of(32), timeout_s=0.0)
    assert "0.0234 GiB free, and the weights need 0.0313 GiB" in caplog.text
    second = host_weights.share("step1", payload_of(32), timeout_s=0.0)
    assert first.path == second.path
    assert first.path.is_relative_to(elsewhere)
    first.release()
    second.release()


def test_a_file_lasts_as_long_as_somebody_reads_it(place: Path) -> None:
    first, second = (host_weights.share("step1", payload_of(1), timeout_s=0.0) for _ in range(2))
    inode = second.path.stat().st_ino
    first.release()
    host_weights.remove_unused()
    assert second.path.stat().st_ino == inode
    second.release()
    assert not second.path.exists()


def test_an_engine_that_starts_removes_what_dead_processes_left(place: Path) -> None:
    used = host_weights.share("step2", payload_of(1), timeout_s=0.0)
    (used.path.parent / "step1.safetensors").write_bytes(b"x")
    (used.path.parent / "step1.partial").write_bytes(b"x")
    other = used.path.parent / "notes.txt"
    other.write_text("not ours")
    host_weights.remove_unused()
    assert sorted(path.name for path in used.path.parent.iterdir()) == ["notes.txt", "step2.safetensors"]
    used.release()


def test_a_writer_that_takes_too_long_is_named(place: Path) -> None:
    host_weights.share("step1", payload_of(1), timeout_s=0.0).release()  # makes the folder
    (folder,) = place.iterdir()
    with (folder / "step1.partial").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(EngineTimeout, match=r"within 0\.1 s, because another process has been writing .*step1"):
            host_weights.share("step1", payload_of(1), timeout_s=0.1)


def test_a_folder_of_another_user_is_refused(place: Path) -> None:
    (place / f"autotraj-weights-{os.getuid()}").symlink_to(place)
    with pytest.raises(EngineError, match=r"not a folder of this user .*remove it"):
        host_weights.share("step1", payload_of(1), timeout_s=0.0)


def test_the_file_carries_every_bit(place: Path) -> None:
    """bfloat16 as its uint16 bits; strided and read-only arrays as Ray hands them out; scalars, and tensors of nothing."""
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    matrix.flags.writeable = False
    bits = np.array([0x3F80, 0xC000, 0x7FC0], np.uint16)  # 1.0, −2.0 and not a number
    payload: dict[str, tuple[NDArray[Any], str]] = {
        "byte": (np.array([True, False, True]), "bool"),
        "b": (bits, "bfloat16"),
        "a": (matrix.T, "float32"),
        "scalar": (np.array(2.5, np.float64), "float64"),
        "nothing": (np.zeros((0, 3), np.float16), "float16"),
    }
    shared = host_weights.share("step1", payload, timeout_s=0.0)
    tensors = dict(host_weights.read(str(shared.path)))
    shared.release()
    assert tensors["a"].tolist() == matrix.T.tolist()
    assert tensors["b"].dtype == torch.bfloat16
    assert tensors["b"].view(torch.uint16).tolist() == bits.tolist()
    assert tensors["byte"].tolist() == [True, False, True]
    assert (tensors["scalar"].shape, tensors["scalar"].item()) == ((), 2.5)
    assert tensors["nothing"].shape == (0, 3)
