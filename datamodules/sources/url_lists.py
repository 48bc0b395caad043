"""Which images the published lists name: Open Images' CSV, MMC4's and OBELICS' documents, any table with URLs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from datamodules.errors import DataError, SampleError
from datamodules.sources.fetching import Wanted
from datamodules.sources.files import find_files
from datamodules.sources.image_list import ID, MD5, URL, list_rows
from datamodules.sources.image_store import is_inside, url_name
from datamodules.sources.tables import TABLE_SUFFIXES, rows

RECORD_BYTES = 64_000_000
NAME_LETTERS = 200


def wanted_images(layout: str, source: Path, column: str | None) -> Iterator[Wanted]:
    """Every image that a list names, in its order; rows that name none are passed over.

    Raises:
        DataError: no such layout, or the source is not of it.
    """
    if layout not in URL_LISTS:
        raise DataError(f"there is no list of layout '{layout}'; there are: {', '.join(URL_LISTS)}.")
    for wanted in URL_LISTS[layout](source, column):
        plain = not wanted.name.startswith(".") and "/" not in wanted.name and len(wanted.name) <= NAME_LETTERS
        if plain and is_inside(wanted.name):
            yield wanted


def _openimages(source: Path, column: str | None) -> Iterator[Wanted]:
    column = column or URL
    for file in find_files(source, (".csv",)):
        for _, row in list_rows(file, 0, file.name):
            if isinstance(row, dict) and column not in row:
                raise DataError(f"'{file}' has no column {column}; it has {', '.join(row)}.")
            if isinstance(row, dict) and row[column]:
                # The hash is that of the original; a thumbnail's is not listed.
                yield Wanted(f"{row[ID]}.jpg", row[column], row.get(MD5, "") if column == URL else "")


def _mmc4(source: Path, column: str | None) -> Iterator[Wanted]:
    for row in _rows(source, ["image_info"]):
        for info in row.get("image_info") or ():
            if isinstance(info, dict) and info.get("image_name") and info.get(column or "raw_url"):
                yield Wanted(str(info["image_name"]), str(info[column or "raw_url"]))


def _obelics(source: Path, column: str | None) -> Iterator[Wanted]:
    for row in _rows(source, [column or "images"]):
        for url in row.get(column or "images") or ():
            if isinstance(url, str):
                yield Wanted(url_name(url), url)


def _urls(source: Path, column: str | None) -> Iterator[Wanted]:
    for row in _rows(source, [column or "url"]):
        url = row.get(column or "url")
        if isinstance(url, str):
            yield Wanted(url_name(url), url)


def _rows(source: Path, columns: list[str]) -> Iterator[dict]:
    for file in find_files(source, TABLE_SUFFIXES):
        for _, content in rows(file, 0, RECORD_BYTES, file.name, columns):
            if isinstance(content, SampleError):
                continue
            try:
                row = json.loads(content) if isinstance(content, bytes) else content
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


URL_LISTS: dict[str, Callable[[Path, str | None], Iterator[Wanted]]] = {
    "mmc4": _mmc4,
    "obelics": _obelics,
    "openimages": _openimages,
    "urls": _urls,
}
