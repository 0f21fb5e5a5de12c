"""A real HTTP server that speaks as much of the chat-completions interface as it is told, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What one request gets. `body` None: a completion that says `content`."""

    content: str | None = None
    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    silent_s: float = 0.0  # before the first byte
    dribble_s: float = 0.0  # between the bytes


BUSY = Reply(status=429, body='{"error": {"message": "slow down"}}', headers={"retry-after-ms": "10"})


class ChatServer:
    """Gives `replies` in order, the last of them forever, and remembers what it was asked."""

    def __init__(self, replies: Sequence[Reply | str]) -> None:
        self._replies = [Reply(r) if isinstance(r, str) else r for r in replies]
        self._lock = threading.Lock()
        self.ended = threading.Event()
        self.was_asked = threading.Event()
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.busy = self.most_busy = 0
        self.url = ""

    def next(self, request: dict[str, Any], key: str) -> Reply:
        with self._lock:
            self.asked.append(request)
            self.keys.append(key)
            self.was_asked.set()
            return self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]

    def count(self, change: int) -> None:
        with self._lock:
            self.busy += change
            self.most_busy = max(self.most_busy, self.busy)


@contextmanager
def chat_server(*replies: Reply | str) -> Iterator[ChatServer]:
    chat = ChatServer(replies)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            chat.count(1)
            try:
                self._answer()
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client had enough
            finally:
                chat.count(-1)

        def _answer(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            reply = chat.next(request, self.headers["authorization"])
            chat.ended.wait(reply.silent_s)
            body = reply.body
            if body is None:
                message = {"role": "assistant", "content": reply.content}
                choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
                body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}})
            data = body.encode()
            self.send_response(reply.status)
            for name, value in {"content-type": "application/json", "content-length": str(len(data))}.items():
                self.send_header(name, value)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if not reply.dribble_s:
                self.wfile.write(data)
                return
            for byte in data:
                self.wfile.write(bytes([byte]))
                if chat.ended.wait(reply.dribble_s):
                    return

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        chat.ended.set()
        time.sleep(0)  # let sleepers see it before their sockets close
        server.shutdown()
        server.server_close()
        thread.join(5)
