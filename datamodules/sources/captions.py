"""Captions without images, for stage 2: tables of LAION, COYO, CC3M and CC12M as published."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.sample import CaptionSample
from datamodules.sources.converter import ConversionConfig, Converter, at_least
from datamodules.sources.files import Record
from datamodules.sources.tables import parse, rows, text_of, value_of


@dataclass
class CaptionsConfig(ConversionConfig):
    """Settings of tables of captions."""

    column: str = "caption"
    """Column of the caption: a name (LAION `TEXT` or `caption`, COYO `text`), or in TSV and CSV files without header
    its number from 0 (CC3M 0, CC12M 1)."""
    width: str | None = None
    """Column of the image's width in pixels; used by `min_side`."""
    height: str | None = None
    """Column of the image's height in pixels; used by `min_side`."""
    min_side: int = 0
    """Filter captions of images whose width or height has fewer pixels."""
    min_characters: int = 1
    """Filter shorter captions."""
    max_characters: int = 2000
    """Filter longer captions. Limits in tokens are applied in training."""

    def __post_init__(self):
        super().__post_init__()
        at_least("min_characters", self.min_characters, 1)
        at_least("max_characters", self.max_characters, self.min_characters)
        if self.min_side and not (self.width and self.height):
            raise ValueError(f"min_side={self.min_side} needs width= and height=, the columns of the image's size.")


class Captions(Converter[CaptionsConfig]):
    """Converts rows to caption samples without an image."""

    schema = CaptionsConfig

    def records(self, file: Path) -> Iterator[Any]:
        config = self.config
        columns = [column for column in (config.column, config.width, config.height) if column]
        return rows(file, config.max_record_bytes, columns, header=not config.column.isdigit())

    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[CaptionSample]:
        config, row = self.config, parse(record)
        caption = text_of(record, value_of(record, row, config.column), config.column).strip()
        if not caption:
            raise record.error("empty_caption", f"{config.column} contains no text")
        if not config.min_characters <= len(caption) <= config.max_characters:
            allowed = f"allowed {config.min_characters} … {config.max_characters}"
            raise record.filtered("caption_length", f"{len(caption)} characters, {allowed}")
        if config.min_side:
            sides = [str(row.get(name)) for name in (config.width, config.height)]
            if not all(side.isdecimal() and len(side) < 10 for side in sides):
                raise record.filtered("size_not_integer", f"{sides[0]}×{sides[1]}")
            if min(int(side) for side in sides) < config.min_side:
                raise record.filtered("image_too_small", f"{sides[0]}×{sides[1]}, at least {config.min_side} a side")
        return [CaptionSample(caption)]
