"""A real S3 API on a loopback port: moto's server in a process of its own, and a proxy that can start to refuse."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3

EXPIRED = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message><RequestId>0</RequestId></Error>"""
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """The address of a server that holds one empty bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120.0
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
                break
            except OSError:
                assert process.poll() is None, "moto's server ended"
                assert time.monotonic() < deadline, "moto's server doesn't answer"
                time.sleep(0.2)
        client(f"http://127.0.0.1:{port}").create_bucket(Bucket=bucket)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def client(address: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=address, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    )


def objects(address: str, bucket: str, prefix: str) -> set[str]:
    """Names below `prefix`, without the markers of empty folders, as another client than ours sees them."""
    pages = client(address).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/")
    names = {entry["Key"].removeprefix(prefix + "/") for page in pages for entry in page.get("Contents", [])}
    return {name for name in names if name and not name.endswith("/")}


def environment(address: str, cache: object, key: str | None = "test") -> dict[str, str]:
    """Of a process on a machine whose cache is `cache`; `key` None leaves credentials to ~/.aws."""
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(cache),
    }
    return settings | ({"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": "test"} if key else {})


def set_environment(settings: dict[str, str], put: Callable[[str, str], None]) -> None:
    """`put` is monkeypatch.setenv."""
    for name in KEYS:
        os.environ.pop(name, None)
    for name, value in settings.items():
        put(name, value)


class Proxy:
    """Hands every request on to `target`, but for those that `refuses(method, path, access key)`: expired credentials."""

    def __init__(self, target: str) -> None:
        self.refuses: Callable[[str, str, str], bool] = lambda method, path, key: False
        self.num_refused = 0
        host = target.removeprefix("http://")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self._body()
                key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
                if outer.refuses(self.command, self.path, key):
                    outer.num_refused += 1
                    self._answer(403, {"Content-Type": "application/xml"}, EXPIRED)
                    return
                connection = http.client.HTTPConnection(host, timeout=60.0)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "transfer-encoding")}
                connection.request(self.command, self.path, body=body, headers=headers)
                response = connection.getresponse()
                self._answer(response.status, dict(response.getheaders()), response.read())
                connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().partition(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def proxied(bucket: str) -> Iterator[Proxy]:
    """A server with one empty bucket, behind a proxy."""
    with s3_server(bucket) as address:
        made = Proxy(address)
        try:
            yield made
        finally:
            made.close()
