"""A retriever over HTTP: `POST /search` for one query, `POST /batch_search` for several that arrive together.

    {"query": "…", "top_n": 3, "return_score": true}      ──▶ [[{"id", "contents"}, …], [score, …]]
    {"query": ["…", …], "top_n": 3, "return_score": true} ──▶ [[[{"id", "contents"}, …], …], [[score, …], …]]

This is the protocol of FlashRAG's and Tool-Star's retrievers. For any other answer, RetrieverError says what came.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tool_sandbox.config import SearchConfig
from tool_sandbox.search.index import Document, as_document

BACKOFF_S = (0.1, 0.5, 2.0)
"""Waits before the second, the third and all later attempts, seconds."""
BATCH_WINDOW_S = 0.005
"""How long a query waits for others that can share its request, seconds."""
MAX_REPLY_BYTES = 16 * 1024 * 1024
_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})


class RetrieverError(Exception):
    """The retriever didn't answer, or not with documents. The text says which; it becomes a ToolResult."""


class _TemporaryError(RetrieverError):
    """An error after which another try may succeed."""


class HttpRetriever:
    """A client of a retriever. Make it and use it inside one event loop. No method waits longer than its attempts last;
    callers add their own deadline."""

    def __init__(self, config: SearchConfig) -> None:
        import httpx

        self._config = config
        self._url = config.url.rstrip("/")
        # No proxies from the environment: a retriever is inside the cluster, and a proxy would see every query.
        self._http = httpx.AsyncClient(timeout=config.request_timeout_s, trust_env=False)
        self._gathered: list[tuple[str, asyncio.Future[list[Document]]]] = []
        self._flushes: set[asyncio.Task[None]] = set()

    async def find(self, query: str) -> list[Document]:
        """The documents for `query`, best first. Errors: RetrieverError."""
        if self._config.batch_size == 1:
            reply = await self._post("/search", query)
            return _documents(reply)
        future: asyncio.Future[list[Document]] = asyncio.get_running_loop().create_future()
        self._gathered.append((query, future))
        if len(self._gathered) == 1:
            task = asyncio.create_task(self._flush())
            self._flushes.add(task)
            task.add_done_callback(self._flushes.discard)
        return await future

    async def close(self) -> None:
        for task in self._flushes:
            task.cancel()
        await asyncio.gather(*self._flushes, return_exceptions=True)
        await self._http.aclose()

    async def _flush(self) -> None:
        """Send the gathered queries, in requests of at most `batch_size` queries."""
        await asyncio.sleep(BATCH_WINDOW_S)
        gathered, self._gathered = self._gathered, []
        wanted = [(query, future) for query, future in gathered if not future.done()]  # the caller may be gone
        size = self._config.batch_size
        await asyncio.gather(*(self._send(wanted[i : i + size]) for i in range(0, len(wanted), size)))

    async def _send(self, batch: list[tuple[str, asyncio.Future[list[Document]]]]) -> None:
        try:
            reply = await self._post("/batch_search", [query for query, _ in batch])
            found = reply[0] if isinstance(reply, list) and len(reply) == 2 else None
            if not isinstance(found, list) or len(found) != len(batch):
                raise RetrieverError(f"{self._url}/batch_search answered with something else than {len(batch)} lists")
            for (_, future), documents in zip(batch, found, strict=True):
                if not future.done():
                    future.set_result(_documents([documents, []]))
        except RetrieverError as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise

    async def _post(self, path: str, query: str | list[str]) -> Any:
        """POST to `path`, with `attempts` tries; returns the decoded answer."""
        message = {"query": query, "top_n": self._config.top_n, "return_score": True}
        for attempt in range(1, self._config.attempts + 1):
            try:
                return await self._try(f"{self._url}{path}", message)
            except _TemporaryError as error:
                if attempt == self._config.attempts:
                    raise RetrieverError(f"{error}, at the last of {attempt} attempts") from error
            await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S)) - 1])
        raise AssertionError("at least one attempt is made")

    async def _try(self, url: str, message: dict[str, Any]) -> Any:
        import httpx

        body = bytearray()
        try:
            async with self._http.stream("POST", url, json=message) as response:
                if response.status_code != 200:
                    kind = _TemporaryError if response.status_code in _TEMPORARY else RetrieverError
                    raise kind(f"{url} answered HTTP {response.status_code}")
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_REPLY_BYTES:
                        raise RetrieverError(f"{url} answered with more than {MAX_REPLY_BYTES} bytes")
        except httpx.TransportError as error:
            raise _TemporaryError(f"{url}: {type(error).__name__} {error}".rstrip()) from error
        except httpx.HTTPError as error:
            raise RetrieverError(f"{url}: {type(error).__name__} {error}".rstrip()) from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RetrieverError(f"{url} answered with something else than JSON") from error


def _documents(reply: Any) -> list[Document]:
    """The documents of a `/search` reply; RetrieverError if it isn't one."""
    listed = reply[0] if isinstance(reply, list) and len(reply) == 2 else None
    documents = [as_document(record) for record in listed] if isinstance(listed, list) else [None]
    if None in documents:
        raise RetrieverError("the retriever answered with something else than [[{id, contents}, …], [score, …]]")
    return [document for document in documents if document is not None]
