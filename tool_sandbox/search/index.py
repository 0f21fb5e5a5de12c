"""A local corpus that can be searched with BM25 (`bm25s`), as a folder whose large files are memory-mapped.

    corpus.jsonl ── build_index ──▶ folder: documents.jsonl, offsets.npy, BM25's arrays, index.json ── SearchIndex ──▶ search

A line of the corpus is `{"id": …, "contents": …}`. Several gateways of a node share the mapped pages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tool_sandbox.errors import SearchError

FORMAT = 1
MANIFEST = "index.json"
DOCUMENTS, OFFSETS = "documents.jsonl", "offsets.npy"
ARRAYS = ("data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy")
TEXTS = ("params.index.json", "vocab.index.json")
"""The files that bm25s writes."""
BUILD = "make it with `python -m autotraj search-index corpus.jsonl FOLDER`"

_WORD = re.compile(r"\w+")

Document = dict[str, str]


def words(text: str) -> list[str]:
    """The words that are indexed and searched: runs of letters and digits, in lower case. BM25 gives common words little
    weight."""
    return _WORD.findall(text.lower())


def build_index(corpus: Path, out: Path) -> int:
    """Index the JSON lines of `corpus` into the folder `out`; returns the number of documents.

    `out` appears when it is complete, and replaces an older index. Errors: SearchError, with the line, for a corpus that
    can't be read, a record without id or contents, an id that occurs twice, a corpus without documents, and an `out` that
    is something else than an index.
    """
    import bm25s

    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise SearchError(f"{out} exists and is no search index; name another folder, or remove it")
    scratch = out.with_name(f"{out.name}.partial-{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        vocabulary: dict[str, int] = {}
        tokens: list[list[int]] = []
        offsets, seen = [0], set[str]()
        with (scratch / DOCUMENTS).open("wb") as file:
            for place, document in _records(corpus):
                if document["id"] in seen:
                    raise SearchError(f"{place}: the id {document['id']!r} occurs a second time; give each its own")
                seen.add(document["id"])
                tokens.append([vocabulary.setdefault(w, len(vocabulary)) for w in words(document["contents"])])
                offsets.append(offsets[-1] + file.write(json.dumps(document).encode() + b"\n"))
        if not vocabulary:
            raise SearchError(f"{corpus}: there is no document with a word in it; a line is {_EXAMPLE}")
        np.save(scratch / OFFSETS, np.array(offsets, dtype=np.int64))
        bm25 = bm25s.BM25()
        bm25.index(bm25s.tokenization.Tokenized(ids=tokens, vocab=vocabulary), show_progress=False)
        bm25.save(str(scratch), show_progress=False)
        (scratch / MANIFEST).write_text(json.dumps({"format": FORMAT, "num_documents": len(tokens)}) + "\n")
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(tokens)


_EXAMPLE = '{"id": "a-1", "contents": "text"}'


def _records(corpus: Path) -> Iterator[tuple[str, Document]]:
    """Yields each record and its place (file and line), for messages."""
    try:
        file = corpus.open("rb")
    except OSError as error:
        raise SearchError(f"{corpus}: {error.strerror}; name a file of JSON lines such as {_EXAMPLE}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{corpus}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SearchError(f"{place}: not valid JSON ({error}); a line is {_EXAMPLE}") from error
            document = as_document(record)
            if document is None:
                raise SearchError(
                    f"{place}: this is no object with an id and contents that are text; a line is {_EXAMPLE}"
                )
            yield place, document


def as_document(record: Any) -> Document | None:
    """A record's id and contents; None if it lacks one. An id may be a number."""
    if not isinstance(record, dict) or not isinstance(contents := record.get("contents"), str):
        return None
    name = record.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        return None
    return {"id": str(name), "contents": contents}


def check_index(folder: Path) -> None:
    """Check that `folder` holds a whole index of this version, without reading its large files. Errors: SearchError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise SearchError(f"the search index {folder} has format {manifest['format']}, not {FORMAT}; {BUILD}")
        for name in TEXTS:
            (folder / name).stat()
        # Mapping an array fails unless the file is as long as its header says.
        *_, offsets = [np.load(folder / name, mmap_mode="r") for name in (*ARRAYS, OFFSETS)]
        expected = (manifest["num_documents"] + 1, (folder / DOCUMENTS).stat().st_size)
        if (len(offsets), int(offsets[-1])) != expected:
            raise SearchError(f"the search index {folder} is damaged: {OFFSETS} and {DOCUMENTS} don't agree; {BUILD}")
    except SearchError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SearchError(f"there is no search index in {folder} ({type(error).__name__}: {error}); {BUILD}") from error


class SearchIndex:
    """An index that `build_index` made. `search` may be called from several threads."""

    def __init__(self, folder: Path) -> None:
        """Errors: SearchError, which says what to do, if there is no index in `folder` or one of another version."""
        import bm25s

        check_index(folder)
        try:
            self._bm25 = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
            self._vocabulary: dict[str, int] = self._bm25.vocab_dict
            self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
            self._documents = np.memmap(folder / DOCUMENTS, dtype=np.uint8, mode="r")
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise SearchError(
                f"there is no search index in {folder} ({type(error).__name__}: {error}); {BUILD}"
            ) from error

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def search(self, query: str, top_n: int) -> list[Document]:
        """At most `top_n` documents that share a word with `query`, best first; of equal ones the earlier comes first."""
        known = [word for word in dict.fromkeys(words(query)) if word in self._vocabulary]
        if not known:
            return []
        scores = np.asarray(self._bm25.get_scores(known))
        num = min(top_n, len(scores))
        lowest = np.partition(scores, len(scores) - num)[len(scores) - num]
        candidates = np.flatnonzero(scores >= max(lowest, np.finfo(np.float32).tiny))
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:num]
        return [self._document(int(number)) for number in best]

    def _document(self, number: int) -> Document:
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        document: Document = json.loads(bytes(self._documents[start:end]))
        return document
