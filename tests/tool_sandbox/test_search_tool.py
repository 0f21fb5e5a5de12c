"""The tool `search`: over an index and over a real HTTP retriever, healthy, slow and broken."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig, SearchConfig
from tool_sandbox.errors import SearchError
from tool_sandbox.local import LocalGateway
from tool_sandbox.search.tool import NOTHING_FOUND, SearchTool, build_index, render_documents
from trajectory.types import ToolResult

CORPUS = [{"id": f"doc-{i}", "contents": f"Number {i} is lucky, {'x' * i}"} for i in range(1, 40)]


class Retriever:
    """A real HTTP server. `answer` maps (path, message) to a status and a body; what was asked is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answer: Callable[[str, Any], tuple[int, bytes]] = healthy
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append((self.path, message))
                status, body = outer.answer(self.path, message)
                if status == 0:
                    self.connection.close()  # hangs up without a word
                    return
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # we or the client hung up
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()


def healthy(path: str, message: Any) -> tuple[int, bytes]:
    def found(query: str) -> list[dict[str, str]]:
        return [{"id": f"{query}-{i}", "contents": f"About {query}."} for i in range(message["top_n"])]

    queries = message["query"] if path == "/batch_search" else [message["query"]]
    documents, scores = [found(q) for q in queries], [[1.0] * message["top_n"] for _ in queries]
    return 200, json.dumps([documents, scores] if path == "/batch_search" else [documents[0], scores[0]]).encode()


@pytest.fixture
def retriever() -> Iterator[Retriever]:
    running = Retriever()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in CORPUS))
    build_index(folder / "corpus.jsonl", folder / "index")
    return folder / "index"


async def ask(config: SearchConfig, *queries: str, timeout_s: float = 5.0, queue_s: float = 5.0) -> list[ToolResult]:
    tool = SearchTool(config)
    tool.open()
    await tool.start()
    try:
        calls = (tool.run(q, timeout_s=timeout_s, queue_s=queue_s, session_id=None) for q in queries)
        return list(await asyncio.gather(*calls))
    finally:
        await tool.close()


def test_results_are_cited_flattened_and_cut() -> None:
    documents = [{"id": "a\nb", "contents": "one\n\ntwo  three"}, {"id": "c", "contents": "x" * 30 + "\ud800"}]
    assert render_documents(documents, 20, 1000) == f"[a b] one two three\n[c] {'x' * 16} ..."
    assert render_documents(documents, 20, 30) == "[a b] one two three\n[c] xx ..."
    assert render_documents(documents, 20, 20) == "[a b] one two three"
    assert render_documents(documents[1:], 100, 100) == f"[c] {'x' * 30}?"
    for max_chars in range(1, 60):
        assert len(render_documents(documents, 20, max_chars)) <= max_chars
    assert render_documents([], 20, 20) == ""


async def test_the_index_answers(index: Path) -> None:
    config = SearchConfig(kind="bm25", index=str(index), top_n=2, max_document_chars=24)
    found, nothing = await ask(config, "number 7", "unheardof")
    assert found.status == "ok"
    assert found.output.splitlines()[0] == "[doc-7] Number 7 is lucky, x ..."
    assert len(found.output.splitlines()) == 2
    assert (nothing.status, nothing.output) == ("ok", NOTHING_FOUND)


@pytest.mark.parametrize(
    ("query", "status"),
    [("", "rejected"), (" \n\t", "rejected"), ("x" * 1001, "rejected"), ("lucky " * 166, "ok"), ("東京 \ud800 \0 7", "ok"),
     ("</search><result>7</result>", "ok"), ('") OR 1=1 -- 7', "ok")],
)  # fmt: skip
async def test_hostile_queries(index: Path, query: str, status: str) -> None:
    (result,) = await ask(SearchConfig(kind="bm25", index=str(index)), query)
    assert result.status == status
    assert bool(result.message) == (status == "rejected")


async def test_the_event_loop_stays_free_and_the_deadline_is_kept(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = SearchTool(SearchConfig(kind="bm25", index=str(index), max_concurrent=1))
    tool.open()
    await tool.start()
    monkeypatch.setattr("tool_sandbox.search.index.SearchIndex.search", lambda *_: time.sleep(0.6) or [])
    slow = asyncio.create_task(tool.run("7", timeout_s=0.2, queue_s=5, session_id=None))
    await asyncio.sleep(0.05)
    started = time.monotonic()
    crowded = await tool.run("7", timeout_s=5, queue_s=0.05, session_id=None)
    assert time.monotonic() - started < 0.5  # nobody blocked this loop
    assert crowded.status == "unavailable"
    assert "one of 1 places" in crowded.message
    result = await slow
    assert (result.status, result.message) == ("timeout", "waited 0.2 s on the bm25 search")
    await tool.close()


async def test_the_retriever_is_asked_as_it_expects(retriever: Retriever) -> None:
    (result,) = await ask(SearchConfig(kind="http", url=retriever.url + "/", top_n=2), "tea\nand toast")
    assert (result.status, result.output) == (
        "ok", "[tea and toast-0] About tea and toast.\n[tea and toast-1] About tea and toast."
    )  # fmt: skip
    assert retriever.asked == [("/search", {"query": "tea and toast", "top_n": 2, "return_score": True})]


async def test_queries_that_come_together_share_requests(retriever: Retriever) -> None:
    config = SearchConfig(kind="http", url=retriever.url, top_n=1, batch_size=3, max_concurrent=5)
    results = await ask(config, *"abcde")
    assert [r.output for r in results] == [f"[{q}-0] About {q}." for q in "abcde"]
    assert sorted(message["query"] for _, message in retriever.asked) == [["a", "b", "c"], ["d", "e"]]
    assert {path for path, _ in retriever.asked} == {"/batch_search"}


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "else than JSON"),
        (b"<html>", "else than JSON"),
        (b"[" * 100_000, "else than JSON"),
        (b"null", "answered with something else"),
        (b"[]", "answered with something else"),
        (b"[{}, []]", "answered with something else"),
        (b'[[[{"id": "a"}]], []]', "answered with something else"),
        (b'[[{"id": "a", "contents": 3}], []]', "answered with something else"),
    ],
)
async def test_answers_that_are_none(retriever: Retriever, body: bytes, complaint: str, batch_size: int) -> None:
    retriever.answer = lambda *_: (200, body)
    (result,) = await ask(SearchConfig(kind="http", url=retriever.url, batch_size=batch_size), "a")
    assert result.status == "unavailable"
    assert complaint in result.message
    assert len(retriever.asked) == 1  # it would say the same again


@pytest.mark.parametrize(("status", "num_asked"), [(500, 3), (503, 3), (429, 3), (0, 3), (404, 1), (302, 1)])
async def test_only_what_may_pass_is_tried_again(retriever: Retriever, status: int, num_asked: int) -> None:
    retriever.answer = lambda *_: (status, b"")
    (result,) = await ask(SearchConfig(kind="http", url=retriever.url), "a")
    assert result.status == "unavailable"
    assert str(status) in result.message or "RemoteProtocolError" in result.message
    assert len(retriever.asked) == num_asked


async def test_a_hiccup_is_got_over(retriever: Retriever) -> None:
    retriever.answer = lambda path, message: healthy(path, message) if len(retriever.asked) > 1 else (503, b"")
    (result,) = await ask(SearchConfig(kind="http", url=retriever.url, top_n=1), "a")
    assert result.output == "[a-0] About a."


@pytest.mark.parametrize("batch_size", [1, 8])
async def test_a_slow_retriever_meets_the_deadline(retriever: Retriever, batch_size: int) -> None:
    retriever.answer = lambda path, message: time.sleep(1.5) or healthy(path, message)  # type: ignore[func-returns-value]
    started = time.monotonic()
    (result,) = await ask(SearchConfig(kind="http", url=retriever.url, batch_size=batch_size), "a", timeout_s=0.3)
    assert time.monotonic() - started < 1.4
    assert (result.status, result.message) == ("timeout", "waited 0.3 s on the http search")


async def test_too_long_an_answer_is_not_read_on(retriever: Retriever) -> None:
    retriever.answer = lambda *_: (200, b" " * (17 << 20))
    (result,) = await ask(SearchConfig(kind="http", url=retriever.url), "a")
    assert "more than 16777216 bytes" in result.message


async def test_no_retriever_at_all() -> None:
    (result,) = await ask(SearchConfig(kind="http", url="http://127.0.0.1:9", attempts=2), "a")
    assert result.status == "unavailable"
    assert "ConnectError" in result.message
    assert "the last of 2 attempts" in result.message


@pytest.mark.parametrize("settings", [{"kind": "bm25"}, {"kind": "http"}, {"kind": "http", "url": "ftp://x"}])
def test_a_kind_needs_its_source(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="needs"):
        SearchConfig.model_validate(settings)


@pytest.mark.docker
def test_the_gateway_has_both_tools(index: Path) -> None:
    search = SearchConfig(kind="bm25", index=str(index), top_n=1)
    config = SandboxConfig(num_containers=1, num_spares=0, slots_per_container=1, start_timeout_s=120, search=search)
    with LocalGateway(config) as gateway, SandboxClient(gateway.address) as client:
        assert client.call("search", "number 7").output == "[doc-7] Number 7 is lucky, xxxxxxx"
        assert client.call("python", "print(2+2)").output == "4\n"
        assert client.call("search", "").status == "rejected"
        assert client.call("browser", "x").message == "no tool named 'browser' here; there is python, search"


@pytest.mark.docker
def test_a_gateway_without_its_index_says_how_to_make_it(tmp_path: Path) -> None:
    search = SearchConfig(kind="bm25", index=str(tmp_path / "none"))
    with pytest.raises(SearchError, match="search-index"):
        LocalGateway(SandboxConfig(search=search))
