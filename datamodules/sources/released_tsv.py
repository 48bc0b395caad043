"""Shards of the released code: tab-separated rows with base64 images (columns in docs/released-code.md).

    openimage        caption, comma-separated tags, image, then for each tag: crop with background, crop on white
    instructpix2pix  caption, instruction, then pairs of images: before, after
    laion            id, caption, image, width, height (further columns are ignored)

The released loader strips edit rows, so that an empty caption shifts all columns; here, captions may be empty.
"""

import base64
import binascii
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from datamodules.images import SampleImage, StoredImage
from datamodules.sample import CaptionSample, ConstructedSample, EditSample, Entity, Sample
from datamodules.sources.converter import Converter, ImageConversionConfig, checked_image
from datamodules.sources.files import Record, Unreadable, lines, read_streams
from datamodules.sources.tables import decoded


@dataclass
class ReleasedTsvConfig(ImageConversionConfig):
    """Settings of the released code's shards."""

    rows: Literal["openimage", "instructpix2pix", "laion"] = MISSING
    """Format of the rows."""


class ReleasedTsv(Converter[ReleasedTsvConfig]):
    """Converts rows to constructed, edit or caption samples."""

    schema = ReleasedTsvConfig
    suffixes = (".tsv",)

    def records(self, file: Path) -> Iterator[Any]:
        for line in read_streams(file, partial(lines, limit=self.config.max_record_bytes)):
            yield line if isinstance(line, Unreadable) else line.rstrip(b"\r\n") or None

    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[Sample]:
        readers: dict[str, Callable[[Record, list[str]], Sample]] = {
            "openimage": self._constructed,
            "instructpix2pix": self._edit,
            "laion": self._caption,
        }
        return [readers[self.config.rows](record, decoded(record, record.content).split("\t"))]

    def _constructed(self, record: Record, columns: list[str]) -> ConstructedSample:
        tags = columns[1].split(",") if len(columns) > 1 and columns[1] else []
        if len(columns) != 3 + 2 * len(tags):
            detail = f"{len(columns)} columns for {len(tags)} tags, expected {3 + 2 * len(tags)}"
            raise record.error("wrong_columns", detail)
        if not columns[0].strip():
            raise record.error("empty_caption", "the first column contains no text")
        if not all(tag.strip() for tag in tags):
            raise record.error("empty_text", f"one of the tags {columns[1]!r:.100} is empty")
        target, *crops = (self._image(record, columns, i) for i in range(2, len(columns)))
        entities = [Entity(tag, *crops[2 * i : 2 * i + 2]) for i, tag in enumerate(tags)]
        return ConstructedSample(columns[0], entities, target)

    def _edit(self, record: Record, columns: list[str]) -> EditSample:
        if len(columns) < 4 or len(columns) % 2:
            detail = f"{len(columns)} columns, expected caption, instruction and pairs of images"
            raise record.error("wrong_columns", detail)
        if not columns[1].strip():
            raise record.error("empty_text", "the second column, the instruction, contains no text")
        images: list[SampleImage] = [self._image(record, columns, i) for i in range(2, len(columns))]
        (source, target), *more = zip(images[::2], images[1::2], strict=True)
        return EditSample(columns[0], columns[1], source, target, more=more)

    def _caption(self, record: Record, columns: list[str]) -> CaptionSample:
        if len(columns) < 5:
            raise record.error("wrong_columns", f"{len(columns)} columns, expected id, caption, image, width, height")
        _, caption, _, *sides = columns[:5]
        if not caption.strip():
            raise record.error("empty_caption", "the second column contains no text")
        # Both stages of the released code also filter these rows.
        if not all(side.isdecimal() and len(side) < 10 for side in sides):
            raise record.filtered("size_not_integer", f"{sides[0]!r}×{sides[1]!r}")
        width, height = map(int, sides)
        if min(width, height) < self.config.images.min_side:
            least = self.config.images.min_side
            raise record.filtered("image_too_small", f"{width}×{height}, at least {least} a side")
        metadata = {"id": columns[0], "original_width": width, "original_height": height}
        return CaptionSample(caption, self._image(record, columns, 2, sized=True), metadata=metadata)

    def _image(self, record: Record, columns: list[str], number: int, sized: bool = False) -> StoredImage:
        try:
            content = base64.b64decode(columns[number], validate=True)
        except (binascii.Error, ValueError) as error:
            raise record.error("invalid_base64", f"column {number}: {error}") from error
        return checked_image(record, content, str(number), self.config, sized=sized)
