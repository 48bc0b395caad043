"""Write the URLs of the images of MMC4, OBELICS and Open Images as a list for img2dataset."""

import base64
import binascii
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datamodules.errors import DataError, SampleError
from datamodules.sources.files import Record, find_files, pyarrow
from datamodules.sources.openimages import MD5, URL
from datamodules.sources.tables import TABLE_SUFFIXES, list_of, parse, rows, text_of, value_of
from kosmosg.files import replaced

COLUMNS = {"mmc4": "image_info", "obelics": "images", "openimages": URL}
"""Column with the URLs of each data set."""
RECORD_BYTES = 64_000_000
BATCH = 100_000


def write_url_list(name: str, source: Path, output: Path) -> tuple[int, int]:
    """Write a Parquet file with `url` and, for Open Images, `md5` (of the original, hexadecimal; null if unknown).

    Returns:
        The number of URLs written and the number of unreadable records.

    Raises:
        DataError: the source contains no URL.
    """
    arrow = pyarrow(output)
    from pyarrow.parquet import ParquetWriter

    schema = arrow.schema([("url", arrow.string()), *([("md5", arrow.string())] if name == "openimages" else [])])
    written, unreadable = 0, [0]
    urls = _urls(name, source, unreadable)
    with replaced(output) as temporary:
        with ParquetWriter(temporary, schema) as writer:
            while batch := list(islice(urls, BATCH)):
                writer.write_table(arrow.Table.from_pylist(batch, schema))
                written += len(batch)
        if not written:
            raise DataError(f"'{source}' contains no URL ({unreadable[0]} unreadable records); is it from '{name}'?")
    return written, unreadable[0]


def _urls(name: str, source: Path, unreadable: list[int]) -> Iterator[dict[str, Any]]:
    columns = [COLUMNS[name], *([MD5] if name == "openimages" else [])]
    for index, file in enumerate(find_files(source, (".csv",) if name == "openimages" else TABLE_SUFFIXES)):
        for number, content in enumerate(rows(file, RECORD_BYTES, columns)):
            record = Record(index, number, file.name, content)
            try:
                if content is not None:
                    yield from _urls_of(name, record, parse(record))
            except SampleError:
                unreadable[0] += 1


def _urls_of(name: str, record: Record, row: dict) -> list[dict[str, Any]]:
    value = value_of(record, row, COLUMNS[name])
    if name == "openimages":
        return [{"url": text_of(record, value, URL), "md5": _hexadecimal(row.get(MD5, ""))}] if value else []
    urls = list_of(record, value, COLUMNS[name])
    if name == "mmc4":
        urls = [info.get("raw_url") for info in urls if isinstance(info, dict)]
    return [{"url": text_of(record, url, "url")} for url in urls if url is not None]


def _hexadecimal(digest: str) -> str | None:
    try:
        return base64.b64decode(digest, validate=True).hex() or None
    except binascii.Error:
        return None
