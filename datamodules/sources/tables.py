"""Read rows of JSON lines, JSON, Parquet, CSV and TSV files as dicts, and check values of rows.

CSV is read with Python's csv module, because pyarrow rejects a whole file for one caption that is not UTF-8, and reads
the rest of a file as one row after an unclosed quote. Here, such errors affect only their own row.
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
"""Parquet rows read at a time."""
MAX_CSV_ROW = 1_000_000
"""Maximum number of characters of a CSV row with line breaks; bounds the effect of an unclosed quote."""


def rows(
    path: Path, limit: int, columns: Sequence[str] = (), *, header: bool = True
) -> Iterator[bytes | dict | Unreadable | None]:
    """Yield each row, None for a blank line. JSON lines are yielded as bytes, for the worker processes to `parse`.

    Args:
        limit: maximum number of bytes of a line.
        columns: columns to read from a Parquet file, if they exist; empty: all.
        header: whether the first row of CSV and TSV files contains column names; else they are "0", "1" …
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
    """Return the record's row. Raises SampleError: `invalid_json`, or the reason why the record is unreadable."""
    if isinstance(record.content, Unreadable):
        raise record.error(record.content.reason, record.content.detail)
    if isinstance(record.content, dict):
        return record.content
    return parse_json(record, record.content, "the line")


def parse_json(record: Record, content: bytes, name: str) -> dict:
    """Parse a JSON object. Raises SampleError: `invalid_json`."""
    try:
        value = json.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        raise record.error("invalid_json", f"{name}: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise record.error("invalid_json", f"{name} is a {type(value).__name__}, it must be an object")
    return value


def value_of(record: Record, row: dict, column: str) -> Any:
    """Return the value of a column; `a.b` is `b` inside `a`. Raises SampleError: `missing_column`."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            raise record.error("missing_column", f"no column {column} among {', '.join(map(str, row))[:200]}")
        value = value[part]
    return value


def text_of(record: Record, value: Any, name: str) -> str:
    """Check that a value is a text that can be encoded. Raises SampleError: `invalid_field` or `not_utf8`."""
    if not isinstance(value, str):
        raise record.error("invalid_field", f"{name} is {value!r:.60}, it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise record.error("not_utf8", f"{name}: {error.reason} at character {error.start}") from error
    return value


def list_of(record: Record, value: Any, name: str) -> list:
    """Check that a value is a list. Raises SampleError: `invalid_field`."""
    if not isinstance(value, list):
        raise record.error("invalid_field", f"{name} is {value!r:.60}, it must be a list")
    return value


def decoded(record: Record, content: bytes) -> str:
    """Decode UTF-8. Raises SampleError: `not_utf8`."""
    try:
        return decode_text(content)
    except UnicodeDecodeError as error:
        raise record.error("not_utf8", f"{error.reason} at byte {error.start}") from error


class _RecordLines:
    """Yields the lines of one CSV record to csv.reader. Lines consumed by an unclosed quote can be put back."""

    def __init__(self, source: Iterator[bytes | Unreadable]):
        self.source, self.returned = source, list[str | Unreadable]()
        self.consumed: list[str | Unreadable] = []
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.returned.pop() if self.returned else self._decode(next(self.source))
        self.consumed.append(line)
        self.size += 0 if isinstance(line, Unreadable) else len(line)
        if isinstance(line, Unreadable) or (len(self.consumed) > 1 and self.size > MAX_CSV_ROW):
            raise StopIteration  # inside quotes, csv.reader then rejects the record
        return line

    def begin(self) -> None:
        """Start a new record."""
        self.consumed, self.size = [], 0

    def put_back(self) -> None:
        """Put back all lines except for the first."""
        self.returned += self.consumed[:0:-1]

    def _decode(self, line: bytes | Unreadable) -> str | Unreadable:
        # Bytes that are not UTF-8 are an error only if their value is used.
        return line if isinstance(line, Unreadable) else decode_text(line, "surrogateescape")


def _delimited_rows(
    stream: IO[bytes], limit: int, delimiter: str, header: bool
) -> Iterator[dict[str, str] | Unreadable | None]:
    """Yield records, whose quoted values may contain line breaks. TSV rows with invalid quoting are read literally."""
    source, names = _RecordLines(_physical_lines(stream, limit)), list[str]()
    while True:
        source.begin()
        values, problem = list[str](), ""
        try:
            values = next(csv.reader(source, delimiter=delimiter, strict=True))
        except csv.Error as error:
            problem = str(error)
        except StopIteration:
            if not source.consumed:
                return
        line = source.consumed[0]
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
        yield from [line] if isinstance(line, Unreadable) else line.splitlines(keepends=True)  # also at "\r"


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict | Unreadable]:
    pyarrow(path)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            names = table.schema_arrow.names
            wanted = [column if column in names else column.partition(".")[0] for column in columns]
            wanted = [column for column in dict.fromkeys(wanted) if column in names]
            if columns and not wanted:
                yield Unreadable("missing_column", f"no column {' or '.join(columns)} among {', '.join(names)[:200]}")
                return
            for batch in table.iter_batches(PARQUET_BATCH, columns=wanted or None):
                yield from _batch_rows(batch)
    except (ArrowException, *UNOPENABLE) as error:
        yield damaged(error)


def _batch_rows(batch: Any) -> Iterator[dict | Unreadable]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # pyarrow validates texts only when they are converted
        for number in range(len(batch)):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Unreadable("not_utf8", f"{error.reason} at byte {error.start}")


def _holds_lines(path: Path, limit: int) -> bool:
    """Whether a .json file contains JSON lines, as C4's files do."""
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
