"""Captions without images for stage 2, which reads no image: the tables of LAION, COYO, CC3M and CC12M as published."""

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datamodules.errors import FilteredSample
from datamodules.sample import CaptionSample
from datamodules.sources.config import ConversionConfig, at_least
from datamodules.sources.files import find_files, lines, plain_suffix
from datamodules.sources.layout import Layout, Numbered, Record
from datamodules.sources.tables import TABLE_SUFFIXES, decoded, parse, rows, text_of


@dataclass
class CaptionsConfig(ConversionConfig):
    """A table of captions."""

    column: str = "caption"
    """Where a row holds its caption: a column's name (LAION `TEXT` or `caption`, COYO `text`), or in TSV and CSV files
    without names its number from 0 (CC3M 0, CC12M 1)."""
    width: str | None = None
    """Column of the image's width in pixels, with `height`: what `min_side` looks at."""
    height: str | None = None
    """Column of the image's height in pixels."""
    min_side: int = 0
    """Pixels; captions of images with a smaller width or height are left out."""
    min_characters: int = 1
    """Shorter captions are left out."""
    max_characters: int = 2000
    """Longer captions are left out; tokens are counted when training reads them."""

    def __post_init__(self):
        super().__post_init__()
        at_least("min_characters", self.min_characters, 1)
        at_least("max_characters", self.max_characters, self.min_characters)
        if self.min_side and not (self.width and self.height):
            raise ValueError(f"min_side={self.min_side} needs width= and height=, the columns that tell the sizes.")


class Captions(Layout[CaptionsConfig]):
    """Rows become caption samples without an image."""

    schema = CaptionsConfig

    def files(self) -> list[Path]:
        return find_files(self.source, (*TABLE_SUFFIXES, ".tsv", ".csv"))

    def records(self, file: Path, start: int) -> Numbered:
        config, name = self.config, self.name_of(file)
        if plain_suffix(file) in TABLE_SUFFIXES:
            columns = [column for column in (config.column, config.width, config.height) if column]
            yield from rows(file, start, config.max_record_bytes, name, columns)
            return
        delimiter = "\t" if plain_suffix(file) == ".tsv" else ","
        names: list[str] | None = None
        for number, line in lines(file, 0, config.max_record_bytes, name):
            if not isinstance(line, bytes):
                yield number, line
            elif names is None and not config.column.isdigit():
                names = next(csv.reader([line.decode("utf-8", "replace")], delimiter=delimiter))
            elif number >= start:
                yield number, (line, delimiter, names)

    def samples(self, record: Record, left_out: Counter[str]) -> Iterable[CaptionSample]:
        config, row = self.config, self._row(record)
        if config.column not in row:
            raise record.error("missing_column", f"no '{config.column}' among {', '.join(row)[:200]}")
        caption = text_of(record, row[config.column], config.column).strip()
        if not caption:
            raise record.error("empty_caption", f"{config.column} holds no text")
        if not config.min_characters <= len(caption) <= config.max_characters:
            detail = f"{len(caption)} characters, allowed {config.min_characters} … {config.max_characters}"
            raise FilteredSample("caption_length", record.name, str(record.number), detail)
        if config.min_side:
            sides = [str(row.get(name)) for name in (config.width, config.height)]
            if not all(side.isdecimal() for side in sides):
                raise FilteredSample("size_not_integer", record.name, str(record.number), f"{sides[0]}×{sides[1]}")
            if min(int(side) for side in sides) < config.min_side:
                detail = f"{sides[0]}×{sides[1]}, at least {config.min_side} a side"
                raise FilteredSample("image_too_small", record.name, str(record.number), detail)
        return [CaptionSample(caption)]

    def _row(self, record: Record) -> dict:
        if not isinstance(record.content, tuple):
            return parse(record)
        line, delimiter, names = record.content
        # Captions of TSV files hold quotation marks that quote nothing.
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        try:
            values = next(csv.reader([decoded(record, line)], delimiter=delimiter, quoting=quoting))
        except (csv.Error, StopIteration) as error:
            raise record.error("invalid_row", str(error)) from error
        return dict(zip(names or map(str, range(len(values))), values, strict=False))
