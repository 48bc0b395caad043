"""Open Images V7: image lists (CSV: ImageID, Subset, OriginalURL, …), and the images in a folder or in tars.

Without captions the samples are images alone, which curation starts from. With Localized Narratives, which Open Images
publishes as JSON lines of `image_id` and `caption`, they are image-caption pairs.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.errors import DataError, SampleError
from datamodules.sample import CaptionSample, ImageSample
from datamodules.sources.converter import ROTATIONS, Converter, ImageConversionConfig, Record, checked_image
from datamodules.sources.files import Unreadable, find_files
from datamodules.sources.image_store import ImageStore
from datamodules.sources.interleaved import store_of
from datamodules.sources.tables import parse, rows, text_of, value_of

ID, URL, MD5, ROTATION = "ImageID", "OriginalURL", "OriginalMD5", "Rotation"
CREDITS = ("License", "Author", "AuthorProfileURL", "Title", "OriginalLandingURL", "OriginalURL", "Subset")
KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass
class OpenImagesConfig(ImageConversionConfig):
    """Images of Open Images."""

    store: str | None = None
    """Folder of the images, or of tars of them, such as img2dataset's output; null: the folder of the list."""
    narratives: str | None = None
    """Localized Narratives, a file or folder of JSON lines; images without one are then filtered."""
    turn: bool = True
    """Turn images as the list's Rotation says (degrees anticlockwise)."""


class OpenImages(Converter[OpenImagesConfig]):
    """Image samples, or caption samples with narratives; licence and author stand in their json."""

    schema = OpenImagesConfig

    def __init__(self, source: Path, config: OpenImagesConfig):
        super().__init__(source, config)
        self.store = ImageStore(store_of(source, config.store), config.limits.max_member_bytes)
        self.narratives = _narratives(Path(config.narratives)) if config.narratives else None

    def files(self) -> list[Path]:
        return find_files(self.source, (".csv",))

    def records(self, file: Path) -> Iterator[Any]:
        return rows(file, self.config.max_record_bytes)

    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[ImageSample | CaptionSample]:
        row = record.content
        identity = value_of(record, row, ID)
        if not KEY.fullmatch(identity):
            raise record.error("refused_path", f"{ID} {identity!r:.100} is no plain name")
        caption = self.narratives.get(identity) if self.narratives is not None else None
        if self.narratives is not None and not caption:
            raise record.filtered("no_narrative", identity)
        try:
            content = self.store.find(record, f"{identity}.jpg", row.get(URL, ""))
        except SampleError as error:
            if error.reason != "missing_image":
                raise
            # Links die: that an image of the list is not there is no fault of those that are.
            raise record.filtered("missing_image", identity) from error
        image = checked_image(record, content, identity, self.config, turn=self._turn(row))
        metadata = {name: text_of(record, row[name], name) for name in CREDITS if row.get(name)} | {"id": identity}
        if caption:
            return [CaptionSample(caption, image, key=identity, metadata=metadata)]
        return [ImageSample(image, key=identity, metadata=metadata)]

    def _turn(self, row: dict[str, str]) -> int:
        try:
            degrees = round(float(row.get(ROTATION) or 0)) % 360
        except (ValueError, OverflowError):
            return 0
        return degrees if self.config.turn and degrees in ROTATIONS else 0


def _narratives(place: Path) -> dict[str, str]:
    """The first caption of every image."""
    captions: dict[str, str] = {}
    for file in find_files(place, (".jsonl",)):
        for number, line in enumerate(rows(file, 10_000_000)):
            if line is None:
                continue
            try:
                if isinstance(line, Unreadable):
                    raise ValueError(line.detail)
                row = parse(Record(0, number, file.name, line))
                captions.setdefault(row["image_id"], row["caption"].strip())
            except (SampleError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"'{file}', line {number + 1}: no object with image_id and caption ({error})."
                ) from error
    return captions
