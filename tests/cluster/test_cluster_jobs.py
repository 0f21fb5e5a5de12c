"""What `cluster.jobs` says when a cluster can't be used, with a job server played at the transport; and the exit codes."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobStatus

from cluster import jobs


@contextmanager
def job_server(*, ray_version: str = ray.__version__, python_version: str | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = {"version": "4", "ray_version": ray_version, "ray_commit": "?"}
            if self.path == "/api/v0/cluster_metadata":
                answer = {"result": True, "msg": "", "data": {"pythonVersion": python_version}}  # type: ignore[dict-item]
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def refused(address: str) -> str:
    with pytest.raises(jobs.JobError) as caught:
        jobs.connect(address)
    return str(caught.value)


@pytest.mark.parametrize("address", ["10.0.0.1:8265", "ray://10.0.0.1:10001", "head", "http://"])
def test_an_address_of_another_kind(address: str) -> None:
    assert "write it as http://HEAD:8265" in refused(address)


def test_an_unreachable_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it, nobody answers
        message = refused(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert "nothing answers there" in message
    assert "ray dashboard FILE" in message


def test_another_ray() -> None:
    with job_server(ray_version="2.40.0") as address:
        message = refused(address)
    assert message.startswith(f"Ray {ray.__version__} here, 2.40.0 on the cluster")
    assert "install ray==2.40.0" in message


def test_another_python() -> None:
    with job_server(python_version="3.8.19") as address:
        assert "3.8.19 on the cluster" in refused(address)


def test_a_silent_server_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client would wait forever: it sets no timeout."""
    monkeypatch.setattr(jobs, "REQUEST_TIMEOUT_S", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert "stopped answering" in refused(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_the_environment_does_not_win_over_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with job_server() as address:
        assert jobs.connect(address).get_address() == address


def test_a_working_directory_that_is_too_large(tmp_path: Path) -> None:
    for name, size in (("models/big.bin", 4_000_000), ("data/train.jsonl", 2_000_000), ("code.py", 10)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    with pytest.raises(jobs.JobError, match=r"largest: models/big.bin 4 MiB, data/train.jsonl 2 MiB") as caught:
        jobs.check_size(tmp_path, [], limit_bytes=5_000_000)
    assert "--exclude" in str(caught.value)
    assert jobs.check_size(tmp_path, ["models"], limit_bytes=5_000_000) == 2_000_010
    (tmp_path / ".gitignore").write_text("/data/\n")
    assert jobs.check_size(tmp_path, ["models"]) == 10 + len("/data/\n")


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.STOPPED, None, 130),
        (JobStatus.STOPPED, 0, 130),
        (JobStatus.FAILED, 130, 130),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 1, 1),
        (JobStatus.FAILED, 137, 1),
        (JobStatus.FAILED, 0, 1),
        (JobStatus.FAILED, None, 1),
        (JobStatus.RUNNING, None, 1),
    ],
)
def test_only_success_is_success(status: JobStatus, driver: int | None, code: int) -> None:
    assert jobs.exit_code(status, driver) == code
