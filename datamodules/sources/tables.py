"""Rows of JSON lines, JSON and Parquet files as dictionaries, and checked values from them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.errors import DataError, SampleError
from datamodules.sources.files import DAMAGED, lines, opened, plain_suffix, pyarrow
from datamodules.sources.layout import Record

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
BATCH = 64
"""Parquet rows read at once."""


def rows(
    path: Path, start: int, limit: int, name: str, columns: Sequence[str] = ()
) -> Iterator[tuple[int, bytes | dict | SampleError]]:
    """(number, row) from row `start` on. JSON lines stay bytes: `parse` is left to the worker processes.

    Args:
        columns: what is read of a Parquet file, as far as it is there; none: everything.
    """
    if plain_suffix(path) == ".parquet":
        yield from _parquet_rows(path, start, name, columns)
    elif plain_suffix(path) == ".json" and not _holds_lines(path, limit):
        yield from _whole_json(path, start, limit, name)
    else:
        yield from lines(path, start, limit, name)


def parse(record: Record) -> dict:
    """The record's row. Raises SampleError: `invalid_json`."""
    if isinstance(record.content, dict):
        return record.content
    try:
        row = json.loads(record.content)
    except (ValueError, RecursionError) as error:
        raise record.error("invalid_json", f"{type(error).__name__}: {error}") from error
    if not isinstance(row, dict):
        raise record.error("invalid_json", f"the line holds a {type(row).__name__}, it must be an object")
    return row


def text_of(record: Record, value: Any, name: str) -> str:
    """A text that can be stored. Raises SampleError: `invalid_field` or `not_utf8`."""
    if not isinstance(value, str):
        raise record.error("invalid_field", f"{name} is {value!r:.60}, it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise record.error("not_utf8", f"{name}: {error.reason} at character {error.start}") from error
    return value


def list_of(record: Record, value: Any, name: str) -> list:
    """Raises SampleError: `invalid_field`."""
    if not isinstance(value, list):
        raise record.error("invalid_field", f"{name} is {value!r:.60}, it must be a list")
    return value


def decoded(record: Record, content: bytes) -> str:
    """UTF-8 bytes as text. Raises SampleError: `not_utf8`."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise record.error("not_utf8", f"{error.reason} at byte {error.start}") from error


def _parquet_rows(
    path: Path, start: int, name: str, columns: Sequence[str]
) -> Iterator[tuple[int, dict | SampleError]]:
    pyarrow(path)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as table:
            wanted = [column for column in columns if column in table.schema_arrow.names]
            if columns and not wanted:
                raise DataError(
                    f"'{path}' has no column {' or '.join(columns)}; it has {', '.join(table.schema_arrow.names)}."
                )
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if number + size <= start:
                    number += size
                    continue
                for batch in table.iter_batches(BATCH, row_groups=[group], columns=wanted or None):
                    if number + len(batch) <= start:
                        number += len(batch)
                        continue
                    for row in batch.to_pylist():
                        if number >= start:
                            yield number, row
                        number += 1
    except (ArrowException, *DAMAGED) as error:
        yield number, SampleError("damaged_file", name, str(number), f"{type(error).__name__}: {error}")


def _holds_lines(path: Path, limit: int) -> bool:
    """Whether a .json file is JSON lines, as C4's are."""
    try:
        with opened(path) as stream:
            first = stream.readline(limit)
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False
    except DAMAGED:
        return True  # told as damaged when its lines are read


def _whole_json(path: Path, start: int, limit: int, name: str) -> Iterator[tuple[int, dict | SampleError]]:
    with opened(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"'{path}' is one JSON value of more than max_record_bytes={limit}; write it as JSON lines.")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        yield 0, SampleError("invalid_json", name, "0", f"{type(error).__name__}: {error}")
        return
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        if number >= start:
            wrong = SampleError("invalid_json", name, str(number), f"a {type(row).__name__}, it must be an object")
            yield number, row if isinstance(row, dict) else wrong
