"""Rows of JSON lines, JSON, Parquet, CSV and TSV files as dictionaries, and checked values from them.

CSV is read by Python's csv, not by pyarrow: pyarrow refuses a whole file for one caption that is not UTF-8, and one
quote that is never closed makes it read the file as one row. Here either costs its own row.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from datamodules.sources.files import (
    UNOPENABLE,
    Record,
    Unreadable,
    damaged,
    lines,
    plain_suffix,
    pyarrow,
    read_streams,
)
from kosmosg.files import decode_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", *DELIMITERS)
PARQUET_BATCH = 64
"""Parquet rows read at once."""
CSV_ROW = 1_000_000
"""Most characters of a CSV row of several lines: what a quote that is never closed can cost."""


def rows(
    path: Path, limit: int, columns: Sequence[str] = (), *, header: bool = True
) -> Iterator[bytes | dict | Unreadable | None]:
    """Each row, a blank line as None. JSON lines stay bytes: `parse` is left to the worker processes.

    Args:
        limit: most bytes of a line.
        columns: what is read of a Parquet file, as far as it is there; none: everything.
        header: the first row of CSV and TSV files names the columns; else they are named "0", "1" …
    """
    suffix = plain_suffix(path)
    if suffix == ".parquet":
        yield from _parquet_rows(path, columns)
    elif suffix in DELIMITERS:
        read = partial(_delimited_rows, limit=limit, delimiter=DELIMITERS[suffix], header=header)
        yield from read_streams(path, read)
    elif suffix == ".json" and not _holds_lines(path, limit):
        yield from read_streams(path, partial(_whole_json, limit=limit))
    else:
        for line in read_streams(path, partial(lines, limit=limit)):
            yield line if isinstance(line, Unreadable) or line.strip() else None


def parse(record: Record) -> dict:
    """The record's row. Raises SampleError: `invalid_json`, or why it could not be read."""
    if isinstance(record.content, Unreadable):
        raise record.error(record.content.reason, record.content.detail)
    if isinstance(record.content, dict):
        return record.content
    return parse_json(record, record.content, "the line")


def parse_json(record: Record, content: bytes, name: str) -> dict:
    """A JSON object. Raises SampleError: `invalid_json`."""
    try:
        value = json.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        raise record.error("invalid_json", f"{name}: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise record.error("invalid_json", f"{name} holds a {type(value).__name__}, it must be an object")
    return value


def value_of(record: Record, row: dict, column: str) -> Any:
    """The value of a column; `a.b` is `b` inside `a`. Raises SampleError: `missing_column`."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            raise record.error("missing_column", f"no column {column} among {', '.join(map(str, row))[:200]}")
        value = value[part]
    return value


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
        return decode_text(content)
    except UnicodeDecodeError as error:
        raise record.error("not_utf8", f"{error.reason} at byte {error.start}") from error


class _RecordLines:
    """The lines of one CSV record for csv.reader, remembered: those that an unclosed quote took are read again."""

    def __init__(self, source: Iterator[bytes | Unreadable]):
        self.source, self.again = source, list[str | Unreadable]()
        self.taken: list[str | Unreadable] = []
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.pop() if self.again else self._decoded(next(self.source))
        self.taken.append(line)
        self.size += 0 if isinstance(line, Unreadable) else len(line)
        if isinstance(line, Unreadable) or (len(self.taken) > 1 and self.size > CSV_ROW):
            raise StopIteration  # inside quotes, csv.reader then refuses the record
        return line

    def begin(self) -> None:
        self.taken, self.size = [], 0

    def put_back(self) -> None:
        """All lines but the first."""
        self.again += self.taken[:0:-1]

    def _decoded(self, line: bytes | Unreadable) -> str | Unreadable:
        # Bytes that are not UTF-8 cost the values they stand in, if anybody asks for those.
        return line if isinstance(line, Unreadable) else decode_text(line, "surrogateescape")


def _delimited_rows(
    stream: IO[bytes], limit: int, delimiter: str, header: bool
) -> Iterator[dict[str, str] | Unreadable | None]:
    """Logical records: a quoted value may hold line breaks. A TSV row that quotes do not fit is read without them."""
    source, names = _RecordLines(_physical_lines(stream, limit)), list[str]()
    while True:
        source.begin()
        values, problem = list[str](), ""
        try:
            values = next(csv.reader(source, delimiter=delimiter, strict=True))
        except csv.Error as error:
            problem = str(error)
        except StopIteration:
            if not source.taken:
                return
        line = source.taken[0]
        if isinstance(line, Unreadable):
            yield line
            continue
        if not problem and names and values and len(values) != len(names):
            problem = f"{len(values)} values for {len(names)} columns"
        literal = line.rstrip("\r\n").split(delimiter)
        if problem and delimiter == "\t" and len(literal) == (len(names) or len(literal)):
            source.put_back()
            values, problem = literal, ""
        elif problem and not values:
            source.put_back()
        if problem:
            yield Unreadable("invalid_row", problem)
        elif not values:
            yield None
        elif header and not names:
            names = [name.strip() for name in values]
        else:
            names = names or [str(number) for number in range(len(values))]
            yield dict(zip(names, values, strict=True))


def _physical_lines(stream: IO[bytes], limit: int) -> Iterator[bytes | Unreadable]:
    for line in lines(stream, limit):
        yield from [line] if isinstance(line, Unreadable) else line.splitlines(keepends=True)  # "\r" alone ends one too


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict | Unreadable]:
    pyarrow(path)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            there = table.schema_arrow.names
            wanted = [column if column in there else column.partition(".")[0] for column in columns]
            wanted = [column for column in dict.fromkeys(wanted) if column in there]
            if columns and not wanted:
                yield Unreadable("missing_column", f"no column {' or '.join(columns)} among {', '.join(there)[:200]}")
                return
            for batch in table.iter_batches(PARQUET_BATCH, columns=wanted or None):
                yield from _batch_rows(batch)
    except (ArrowException, *UNOPENABLE) as error:
        yield damaged(error)


def _batch_rows(batch: Any) -> Iterator[dict | Unreadable]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # pyarrow does not look at texts that other programs wrote until they are taken out
        for number in range(len(batch)):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Unreadable("not_utf8", f"{error.reason} at byte {error.start}")


def _holds_lines(path: Path, limit: int) -> bool:
    """Whether a .json file is JSON lines, as C4's are."""
    first = next(read_streams(path, partial(lines, limit=limit)), b"")
    try:
        if isinstance(first, Unreadable):
            return first.reason != "record_too_large"
        return isinstance(json.loads(decode_text(first)), dict)
    except (ValueError, RecursionError):
        return False


def _whole_json(stream: IO[bytes], limit: int) -> Iterator[dict | Unreadable]:
    content = stream.read(limit + 1)
    if len(content) > limit:
        yield Unreadable("record_too_large", f"more than max_record_bytes={limit} in one JSON value; write JSON lines")
        return
    try:
        value = json.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        yield Unreadable("invalid_json", f"{type(error).__name__}: {error}")
        return
    for row in value if isinstance(value, list) else [value]:
        yield row if isinstance(row, dict) else Unreadable("invalid_json", f"{row!r:.60} must be an object")
