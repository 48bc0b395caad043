"""Open Images V7: image lists (CSV: ImageID, Subset, OriginalURL, …), and the images in a folder or in tars.

The samples are images without text, the input of curation. With Localized Narratives, published by Open Images as JSON
lines of `image_id` and `caption`, they are image-caption pairs.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datamodules.errors import SampleError
from datamodules.sample import CaptionSample, ImageSample
from datamodules.sources.converter import ROTATIONS, checked_image
from datamodules.sources.files import Record, find_files
from datamodules.sources.image_store import StoreConfig, StoreConverter
from datamodules.sources.tables import parse, rows, text_of, value_of

ID, URL, MD5, ROTATION = "ImageID", "OriginalURL", "OriginalMD5", "Rotation"
CREDITS = ("License", "Author", "AuthorProfileURL", "Title", "OriginalLandingURL", "OriginalURL", "Subset")
NARRATIVE_BYTES = 10_000_000
KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass
class OpenImagesConfig(StoreConfig):
    """Settings of Open Images."""

    narratives: str | None = None
    """Localized Narratives, a file or folder of JSON lines; if set, images without one are filtered."""
    turn: bool = True
    """Rotate images by the angle in the list's Rotation column (degrees counterclockwise)."""


class OpenImages(StoreConverter[OpenImagesConfig]):
    """Converts to image samples, or to caption samples with narratives. Their json contains licence and author."""

    schema = OpenImagesConfig
    suffixes = (".csv",)

    def __init__(self, source: Path, config: OpenImagesConfig):
        super().__init__(source, config)
        self.narratives = _narratives(Path(config.narratives)) if config.narratives else None

    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[ImageSample | CaptionSample]:
        row = record.content
        identity = value_of(record, row, ID)
        if not KEY.fullmatch(identity):
            raise record.error("refused_path", f"{ID} {identity!r:.100} is not a plain name")
        caption = self.narratives.get(identity) if self.narratives is not None else None
        if self.narratives is not None and not caption:
            raise record.filtered("no_narrative", identity)
        try:
            content = self.store.find(record, f"{identity}.jpg", *filter(None, [row.get(URL)]))
        except SampleError as error:
            if error.reason != "missing_image":
                raise
            # Some URLs of the list are dead, so missing images do not count as failures.
            raise record.filtered("missing_image", identity) from error
        image = checked_image(record, content, identity, self.config, turn=self._turn(row))
        credits = {name: row[name].encode(errors="replace").decode() for name in CREDITS if row.get(name)}
        metadata = credits | {"id": identity}
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
    """Read the first caption of every image. Raises SampleError if a line is not a narrative."""
    captions: dict[str, str] = {}
    for part, file in enumerate(find_files(place, (".jsonl",))):
        for number, content in enumerate(rows(file, NARRATIVE_BYTES)):
            if content is not None:
                record = Record(part, number, file.name, content)
                identity, caption = (text_of(record, parse(record).get(name), name) for name in ("image_id", "caption"))
                captions.setdefault(identity, caption.strip())
    return captions
