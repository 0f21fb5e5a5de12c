"""Reads the rows of a file of tasks, each with its place: JSON lines, one JSON value, Parquet, CSV; gzipped or not.

A row is a value with fields: an object, or a list of objects, whose fields are named by a path such as `0.value`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

Row = Mapping[str, Any] | Sequence[Any]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
ENDINGS = f"{', '.join(SUFFIXES)} (.gz behind it or not)"


def has_rows(path: Path) -> bool:
    """Whether a file with this name can be read here."""
    return _suffix(path) in SUFFIXES


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields each row's place and the row. Raises ValueError, naming the place, for a value that is no row."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with _opened(path) as file:
            if suffix in (".csv", ".tsv"):
                yield from _csv(path, file, "\t" if suffix == ".tsv" else ",")
            elif suffix == ".json":
                yield from _json(path, file)
            else:
                yield from _jsonl(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data.source = {str(path)!r} is not a whole gzip file: {error}") from error


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _row(value: Any, place: str) -> tuple[str, Row]:
    is_list = isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    if not isinstance(value, dict) and not is_list:
        raise ValueError(f"{place}: a {type(value).__name__}, not an object with fields")
    return place, value


def _jsonl(path: Path, file: BinaryIO) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8; or nested too deeply
            raise ValueError(f"{place}: not valid JSON ({error}); a .jsonl file has one object a line") from error
        yield _row(value, place)


def _json(path: Path, file: BinaryIO) -> Iterator[tuple[str, Row]]:
    """A list of rows, an object with exactly one list of objects, which are the rows, or one row. JSON lines are often in a
    file of this name, too."""
    text = file.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(path, io.BytesIO(text))
            return
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    name = ""
    if isinstance(value, dict):
        lists = [
            key for key, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)
        ]
        if len(lists) > 1:
            raise ValueError(
                f"{path}: this is an object with {len(lists)} lists of objects, so the rows can't be identified; "
                "a .json file is one list of objects"
            )
        name = f" of {lists[0]!r}" if lists else ""
        value = value[lists[0]] if lists else [value]
    if not isinstance(value, list):
        raise ValueError(f"{path}: a {type(value).__name__}; a .json file is one list of objects")
    for number, item in enumerate(value, start=1):
        yield _row(item, f"{path}, item {number}{name}")


def _csv(path: Path, file: BinaryIO, delimiter: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a worked solution may be longer than the default of 128 KiB
    reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            place = f"{path}, row {number} (up to line {reader.line_num})"
            # The reader puts fields beyond the header below the key None, and the value None into fields that are missing.
            if None in row or None in row.values():
                raise ValueError(
                    f"{place}: it has {'more' if None in row else 'fewer'} fields than the first line names; a field with "
                    "commas or line breaks needs quotes around it"
                )
            yield place, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable CSV after row {number}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data.source = {str(path)!r} is not readable Parquet after row {number}: {error}") from error
