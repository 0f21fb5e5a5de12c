"""The local index: what is found, in which order, and what can't be indexed."""

import json
from pathlib import Path

import numpy as np
import pytest

from tasks.word_problems.corpus import corpus, facts
from tool_sandbox.errors import SearchError
from tool_sandbox.search.index import SearchIndex, build_index, check_index

BOOKS = [
    {"id": "a", "contents": "The whale is white."},
    {"id": "b", "contents": "A whale, a whale, a whale!"},
    {"id": 3, "contents": "Nothing but the sea\nand  a ship."},
    {"id": "ü/4", "contents": "Über den Wolken: 東京 42"},
    {"id": "e", "contents": "The whale is white."},
]


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    folder = tmp_path_factory.mktemp("books")
    assert build_index(write(folder / "corpus.jsonl", *BOOKS), folder / "index") == 5
    return SearchIndex(folder / "index")


def ids(index: SearchIndex, query: str, top_n: int = 10) -> list[str]:
    return [document["id"] for document in index.search(query, top_n)]


def test_documents_come_back_whole_and_best_first(books: SearchIndex) -> None:
    assert ids(books, "WHALE!") == ["b", "a", "e"]
    assert ids(books, "white whale") == ["a", "e", "b"]  # equal ones in the corpus's order
    assert ids(books, "white whale", top_n=1) == ["a"]
    assert books.search("ship", 3) == [{"id": "3", "contents": "Nothing but the sea\nand  a ship."}]
    assert ids(books, "über 東京") == ["ü/4"]
    assert ids(books, "42") == ["ü/4"]
    assert len(books) == 5


@pytest.mark.parametrize("query", ["", " \n", "!?.", "unheardof", "x" * 100_000, "\ud800 \x00", "<result>", "🐋"])
def test_a_query_that_matches_nothing_finds_nothing(books: SearchIndex, query: str) -> None:
    assert ids(books, query) == []


def test_a_query_of_many_words_is_a_query(books: SearchIndex) -> None:
    assert ids(books, "whale " * 50_000 + "ship") == ["3", "b", "a", "e"]


def test_the_index_is_memory_mapped(books: SearchIndex) -> None:
    assert isinstance(books._bm25.scores["data"], np.memmap)
    assert isinstance(books._documents, np.memmap)
    assert isinstance(books._offsets, np.memmap)


def test_every_fact_of_the_word_problems_is_found_by_its_query(tmp_path: Path) -> None:
    build_index(write(tmp_path / "corpus.jsonl", *corpus()), tmp_path / "index")
    index = SearchIndex(tmp_path / "index")
    for fact in facts():
        best = index.search(fact.query, 2)
        assert best[0] == {"id": fact.id, "contents": fact.contents}


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        (["{not json\n"], "line 1: not valid JSON"),
        (["[" * 100_000 + "\n"], "line 1: not valid JSON"),
        ([BOOKS[0], "\n", {"id": "b"}], "line 3: this is no object with an id and contents"),
        ([{"id": "", "contents": "x"}], "line 1: this is no object with an id"),
        ([{"id": True, "contents": "x"}], "line 1: this is no object with an id"),
        ([["a", "b"]], "line 1: this is no object with an id"),
        ([{"id": 1, "contents": "x"}, {"id": "1", "contents": "y"}], "line 2: the id '1' occurs a second time"),
        ([{"id": "a", "contents": "?!"}], "no document with a word in it"),
        ([], "no document with a word in it"),
    ],
)
def test_mistakes_in_a_corpus_are_named(tmp_path: Path, records: list[object], complaint: str) -> None:
    with pytest.raises(SearchError, match=complaint):
        build_index(write(tmp_path / "corpus.jsonl", *records), tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]  # nothing half made


def test_an_index_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.jsonl", BOOKS[0])
    build_index(source, tmp_path / "index")
    build_index(write(tmp_path / "corpus.jsonl", BOOKS[1]), tmp_path / "index")
    assert ids(SearchIndex(tmp_path / "index"), "whale") == ["b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(SearchError, match="no search index; name another folder"):
        build_index(source, tmp_path / "mine")
    with pytest.raises(SearchError, match="No such file"):
        build_index(tmp_path / "none.jsonl", tmp_path / "other")


def test_a_missing_or_broken_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"there is no search index in .*search-index"):
        SearchIndex(tmp_path)
    build_index(write(tmp_path / "corpus.jsonl", *BOOKS), tmp_path / "index")
    (tmp_path / "index" / "offsets.npy").write_bytes(b"")
    with pytest.raises(SearchError, match="search-index"):
        SearchIndex(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text('{"format": 0}')
    with pytest.raises(SearchError, match="has format 0, not 1"):
        SearchIndex(tmp_path / "index")


@pytest.mark.parametrize("name", ["data.csc.index.npy", "indptr.csc.index.npy", "offsets.npy", "documents.jsonl"])
def test_the_quick_check_finds_files_that_were_cut_short(tmp_path: Path, name: str) -> None:
    build_index(write(tmp_path / "corpus.jsonl", *BOOKS), tmp_path / "index")
    check_index(tmp_path / "index")
    file = tmp_path / "index" / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(SearchError, match="search-index"):
        check_index(tmp_path / "index")
    file.unlink()
    with pytest.raises(SearchError, match="search-index"):
        check_index(tmp_path / "index")
