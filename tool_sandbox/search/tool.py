"""The tool `search`: documents for a query, from a local index (BM25) or an HTTP retriever. It runs in the gateway itself.

    query ──▶ a free place (bounded) ──▶ index, on a thread │ retriever, over HTTP ──▶ one line each: "[id] contents"

The query is hostile text, and so are the documents. Here they are only data; they are escaped where they are appended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tool_sandbox.config import SearchConfig
from tool_sandbox.search.http import HttpRetriever, RetrieverError
from tool_sandbox.search.index import Document, SearchIndex, build_index
from trajectory.types import ToolResult

__all__ = ["NOTHING_FOUND", "SearchTool", "build_index", "render_documents"]

NOTHING_FOUND = "(no documents found)"
CUT = " ..."


class SearchTool:
    """One search source: `open`, then in one event loop `start`, `run`, `close`."""

    broken = ""

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._places = asyncio.Semaphore(config.max_concurrent)
        self._find: Callable[[str], Awaitable[list[Document]]] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._retriever: HttpRetriever | None = None
        self._index: SearchIndex | None = None
        self._closed = False

    def open(self) -> None:
        """Map the index. Errors: SearchError, which says what to do. A retriever is first contacted by the first query, as
        it may start later than the gateway."""
        if self._config.kind == "http":
            self._retriever = HttpRetriever(self._config)
        else:
            self._index = SearchIndex(Path(self._config.index))

    async def start(self) -> None:
        config, index = self._config, self._index
        if index is None:
            assert self._retriever is not None, "open() first"
            self._find = self._retriever.find
            return
        self._threads = ThreadPoolExecutor(config.max_concurrent, "search")
        threads = self._threads

        async def find(query: str) -> list[Document]:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(threads, partial(index.search, query, config.top_n))

        self._find = find

    async def close(self) -> None:
        self._closed = True
        if self._retriever is not None:
            await self._retriever.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(
        self, content: str, *, timeout_s: float, queue_s: float, session_id: str | None, client: str = ""
    ) -> ToolResult:
        """The documents for the query `content`. Sessions and clients make no difference."""
        assert self._find is not None, "start() first"
        config, started = self._config, time.monotonic()
        query = _flat(content)
        if not query:
            return ToolResult(status="rejected", message="the query is empty")
        if len(query) > config.max_query_chars:
            message = (
                f"a query of {len(query)} characters exceeds sandbox.search.max_query_chars={config.max_query_chars}"
            )
            return ToolResult(status="rejected", message=message)
        try:
            async with asyncio.timeout(queue_s):
                await self._places.acquire()
        except TimeoutError:
            waited = time.monotonic() - started
            message = f"the query waited {waited:.1f} s for one of {config.max_concurrent} places"
            return ToolResult(status="unavailable", message=message, queue_s=waited, retry_after_s=1.0)
        queue_s, started = time.monotonic() - started, time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                documents = await self._find(query)
        except TimeoutError:
            message = f"waited {timeout_s:g} s on the {config.kind} search"
            return ToolResult(status="timeout", message=message, duration_s=time.monotonic() - started, queue_s=queue_s)
        except (RetrieverError, RuntimeError) as error:
            # RuntimeError is what asyncio, threads and httpx raise once `close` was called.
            if isinstance(error, RuntimeError) and not self._closed:
                raise
            duration_s = time.monotonic() - started
            return ToolResult(
                status="unavailable", message=str(error), duration_s=duration_s, queue_s=queue_s, retry_after_s=1.0
            )
        finally:
            self._places.release()
        output = render_documents(documents[: config.top_n], config.max_document_chars, config.max_chars)
        return ToolResult(
            status="ok", output=output or NOTHING_FOUND, duration_s=time.monotonic() - started, queue_s=queue_s
        )


def render_documents(documents: Sequence[Mapping[str, str]], max_document_chars: int, max_chars: int) -> str:
    """The text that the model reads: a line for each document, `[id] contents`, best first.

    White space becomes single spaces. A longer document is cut at `max_document_chars` characters. If all documents together
    exceed `max_chars`, the first ones are shown, and the last of them is cut.
    """
    lines: list[str] = []
    left = max_chars
    for document in documents:
        line = _cut(f"[{_flat(document['id'])}] {_cut(_flat(document['contents']), max_document_chars)}", left)
        if not line:
            break
        lines.append(line)
        left -= len(line) + 1
    return "\n".join(lines)


def _flat(text: str) -> str:
    """The text in one line, without lone surrogates, which can't be sent."""
    return " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return text[: max_chars - len(CUT)] + CUT if max_chars > len(CUT) else ""
