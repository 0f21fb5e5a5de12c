"""Storage against a real S3 API over HTTP, and by way of fsspec."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from object_store import Proxy, client, environment, free_port, objects, s3_server, set_environment

from storage import whole
from storage.locations import check_uri, is_uri, join, local_path
from storage.objects import STAMP, Storage, StorageError, fetch, files_of, scratch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "runs"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server(BUCKET) as address:
        yield address


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    made = Proxy(server)
    yield made
    made.close()


@pytest.fixture
def storage(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Storage:
    set_environment(environment(server, tmp_path / "cache"), monkeypatch.setenv)
    return Storage(f"s3://{BUCKET}/{request.node.name.replace('[', '-').rstrip(']')}", retry_s=5.0)


def folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return path


def test_a_location_is_a_path_or_a_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/disk")
    assert not is_uri("runs/tiny")
    assert join("runs/tiny", "sft") == "runs/tiny/sft"
    assert join("s3://b/runs?scheme=http", "sft", "policy") == "s3://b/runs/sft/policy?scheme=http"
    assert local_path("runs/tiny") == Path("runs/tiny")
    assert local_path("s3://b/runs/1") == Path("/disk/autotraj/s3/b/runs/1")
    here, there = local_path("s3://b/runs?endpoint_override=one"), local_path("s3://b/runs?endpoint_override=two")
    assert here != there  # not the same bucket
    check_uri("s3://b/runs/1?region=eu-west-1")
    for wrong in ("s3://", "s3://b/runs/", "s3://key:secret@b/runs", "s3://b/../x"):
        with pytest.raises(ValueError, match=r"no URI of a folder|credentials don't belong|without a slash"):
            check_uri(wrong)


@pytest.mark.parametrize("kind", ["s3", "fsspec"])
def test_a_folder_there_and_back(storage: Storage, tmp_path: Path, kind: str) -> None:
    if kind == "fsspec":
        storage = Storage(f"local://{tmp_path}/elsewhere", retry_s=1.0)  # a scheme that only fsspec knows
    source = folder(tmp_path / "source", a="1", sub__b="22", empty="")
    (source / "big").write_bytes(os.urandom(12 << 20))  # several parts
    assert storage.entries() == {}
    storage.upload(source, files_of(source))
    assert {name: entry.size for name, entry in storage.entries().items()} == {
        "a": 1,
        "big": 12 << 20,
        "empty": 0,
        "sub/b": 2,
    }
    storage.download(tmp_path / "back", ["big", "sub/b"])
    assert (tmp_path / "back/big").read_bytes() == (source / "big").read_bytes()
    assert files_of(tmp_path / "back") == ["big", "sub/b"]
    storage.write("note.json", b"{}")
    assert storage.read("note.json") == b"{}"
    storage.remove("note.json", "never-there")
    with pytest.raises(FileNotFoundError):
        storage.read("note.json")
    storage.at("sub").clear()
    assert set(storage.entries()) == {"a", "big", "empty"}
    storage.clear()
    storage.clear()
    assert storage.entries() == {}


def test_a_folder_without_its_marker_does_not_exist(storage: Storage, tmp_path: Path, server: str) -> None:
    source = folder(tmp_path / "source", a="1", sub__b="22")
    storage.at("step-1").upload(source, files_of(source))
    assert storage.sealed() == []
    storage.seal("step-1")
    assert storage.sealed() == ["step-1"]
    assert storage.sealed_files("step-1") == {"a": 1, "sub/b": 2}
    prefix = storage.uri.removeprefix(f"s3://{BUCKET}/")
    client(server).delete_object(Bucket=BUCKET, Key=f"{prefix}/step-1/a")
    with pytest.raises(StorageError, match="step-1 is damaged: a is missing"):
        storage.sealed_files("step-1")
    storage.unseal("step-1")
    assert storage.sealed() == []
    assert objects(server, BUCKET, prefix) == set()


def test_the_marker_goes_first(storage: Storage, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removal that is cut short leaves no checkpoint that looks whole."""
    source = folder(tmp_path / "source", a="1")
    storage.at("step-1").upload(source, ["a"])
    storage.seal("step-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    proxy.refuses = lambda method, path, key: method == "POST" and "delete" in path  # pyarrow's removal of a folder
    with pytest.raises(StorageError, match="expired"):
        Storage(storage.uri, retry_s=0.5).unseal("step-1")
    assert proxy.num_refused
    assert storage.sealed() == []
    assert set(storage.at("step-1").entries()) == {"a"}


def test_what_can_be_wrong_has_a_name(storage: Storage, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.check()
    assert storage.entries() == {}
    with pytest.raises(StorageError, match=r"s3://nobody/x: .*there is no such bucket"):
        Storage("s3://nobody/x").check()
    with pytest.raises(StorageError, match="xyz"):
        Storage("xyz://a/b").check()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    storage.check()  # the proxy itself is no obstacle
    proxy.refuses = lambda method, path, key: True
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"write .check-.*: the credentials have expired: .*ExpiredToken") as caught:
        storage.check()
    assert time.monotonic() - started < 60
    assert "?" not in str(caught.value).split(":")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StorageError, match="the storage can't be reached"):
        storage.check()


def test_renewed_credentials_are_taken_up_within_the_deadline(
    server: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in a file, as `aws sso login` and sidecars leave them."""

    def give(key: str) -> None:
        partial = tmp_path / "partial"
        partial.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = test\n")
        partial.replace(tmp_path / "credentials")

    set_environment(environment(proxy.address, tmp_path / "cache", key=None), monkeypatch.setenv)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    give("OLD")
    proxy.refuses = lambda method, path, key: key == "OLD"
    renewal = threading.Timer(3.0, give, ["NEW"])
    renewal.start()
    Storage(f"s3://{BUCKET}/renewed", retry_s=60.0).write("a", b"1")
    assert proxy.num_refused
    assert objects(server, BUCKET, "renewed") == {"a"}


def test_a_node_fetches_once_and_again_when_it_changed(storage: Storage, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", **{"config.json": "{}", "model.safetensors": "one"})
    assert fetch(str(source)) == str(source)
    with pytest.raises(StorageError, match="there is nothing"):
        fetch(storage.uri, retry_s=1.0)
    storage.upload(source, files_of(source), last=["config.json"])
    copy = Path(fetch(storage.uri))
    assert copy == local_path(storage.uri)
    assert (copy / "model.safetensors").read_text() == "one"
    inode = (copy / "model.safetensors").stat().st_ino
    command = [sys.executable, "-c", f"from storage.objects import fetch; print(fetch({storage.uri!r}))"]
    others = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [other.communicate(timeout=60)[0].strip() for other in others] == [str(copy)] * 2
    assert (copy / "model.safetensors").stat().st_ino == inode
    time.sleep(1.1)  # S3 gives times in seconds
    (source / "model.safetensors").write_text("two")  # of the same size
    storage.upload(source, ["model.safetensors"])
    assert Path(fetch(storage.uri)) == copy
    assert (copy / "model.safetensors").read_text() == "two"
    assert set(json.loads((copy / STAMP).read_text())) == {"config.json", "model.safetensors"}


def test_scratch_of_the_dead_is_removed(storage: Storage) -> None:
    kill = "import os, signal; from storage.objects import scratch; scratch().__enter__(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", kill], cwd=ROOT, timeout=60, check=False)
    with scratch() as mine:
        left = [path for path in mine.parent.iterdir() if path.name.startswith("scratch-")]
        assert left == [mine]
        with scratch():
            assert mine.is_dir()
    assert not mine.exists()


def test_a_file_or_folder_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    whole.write_whole(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()

    def cut_short(name: str, write: Callable[[Path], None]) -> None:
        with whole.replacing(tmp_path / name) as partial:
            write(partial)
            raise OSError("the disk is full")

    for name, write in (("file", Path.touch), ("folder", Path.mkdir)):
        with pytest.raises(OSError, match="full"):
            cut_short(name, write)
    assert (tmp_path / "file").read_text() == "old"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["old"]

    whole.write_whole(tmp_path / "file", "new")
    with whole.replacing(tmp_path / "folder") as partial:
        partial.mkdir()  # what the attempt before left is gone
        (partial / "new").touch()
    assert (tmp_path / "file").read_text() == "new"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
