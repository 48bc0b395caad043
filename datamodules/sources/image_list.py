"""Open Images' lists (CSV: ImageID, Subset, OriginalURL, …), and one row by its id without all of them in memory."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datamodules.errors import DataError, SampleError
from datamodules.sources.files import lines

ID, URL, MD5, ROTATION = "ImageID", "OriginalURL", "OriginalMD5", "Rotation"
CREDITS = ("License", "Author", "AuthorProfileURL", "Title", "OriginalLandingURL", "OriginalURL", "Subset")
ROW_BYTES = 100_000


def list_rows(file: Path, start: int, name: str) -> Iterator[tuple[int, dict[str, str] | SampleError]]:
    """(number, row) of the list from row `start` on.

    Raises:
        DataError: the first line is not that of such a list.
    """
    columns: list[str] | None = None
    for number, line in lines(file, 0, ROW_BYTES, name):
        if columns is None:
            columns = _header(file, line)
        elif number > start:
            yield number - 1, line if isinstance(line, SampleError) else _row(columns, line, name, number - 1)


class ListIndex:
    """Where each id's row stands in uncompressed lists: 24 bytes a row. Ids are 16 hexadecimal digits.

    Raises:
        DataError: a list is compressed, or not such a list.
    """

    def __init__(self, files: list[Path]):
        self.files, self.columns = files, []
        found: list[np.ndarray] = []
        for number, file in enumerate(files):
            with open(file, "rb") as stream:
                self.columns.append(_header(file, stream.readline(ROW_BYTES)))
                place, rows = self.columns[-1].index(ID), []
                offset = stream.tell()
                for line in stream:
                    identity = _number(line.split(b",", place + 1)[place])
                    if identity is not None:
                        rows.append((identity, number, offset))
                    offset += len(line)
            found.append(np.array(rows, dtype=np.uint64).reshape(-1, 3))
        table = np.concatenate(found)
        self.table = table[np.argsort(table[:, 0], kind="stable")]

    def row(self, identity: str) -> dict[str, str]:
        """The row of an id; empty if it is in no list."""
        number = _number(identity.encode())
        place = int(np.searchsorted(self.table[:, 0], number)) if number is not None else len(self.table)
        if number is None or place >= len(self.table) or int(self.table[place, 0]) != number:
            return {}
        file, offset = (int(value) for value in self.table[place, 1:])
        with open(self.files[file], "rb") as stream:
            stream.seek(offset)
            row = _row(self.columns[file], stream.readline(ROW_BYTES), "", 0)
        return {} if isinstance(row, SampleError) else row


def _header(file: Path, line: bytes | SampleError) -> list[str]:
    columns = [] if isinstance(line, SampleError) else next(csv.reader([line.decode("utf-8-sig", "replace")]), [])
    if ID not in columns:
        raise DataError(f"'{file}' is no list of Open Images: its first line has no column {ID} but {columns!r:.200}.")
    return [column.strip() for column in columns]


def _row(columns: list[str], line: bytes, name: str, number: int) -> dict[str, str] | SampleError:
    try:
        values = next(csv.reader(io.StringIO(line.decode())))
    except (UnicodeDecodeError, csv.Error, StopIteration) as error:
        return SampleError("invalid_row", name, str(number), f"{type(error).__name__}: {error}")
    if len(values) != len(columns):
        detail = f"{len(values)} values for {len(columns)} columns"
        return SampleError("invalid_row", name, str(number), detail)
    return dict(zip(columns, values, strict=True))


def _number(identity: bytes) -> int | None:
    try:
        return int(identity, 16) if len(identity) == 16 else None
    except ValueError:
        return None
