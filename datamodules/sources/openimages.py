"""Open Images V7: image lists and the images in a folder, in tars, or as `kosmosg data download` fetched them.

Without captions the samples are images alone, which curation starts from. With Localized Narratives, which Open Images
publishes as JSON lines of `image_id` and `caption`, they are image-caption pairs.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.errors import DataError, FilteredSample, SampleError
from datamodules.images import SUFFIXES
from datamodules.sample import CaptionSample, ImageSample
from datamodules.sources.config import ImageConversionConfig
from datamodules.sources.files import DAMAGED, find_files, lines
from datamodules.sources.image_list import CREDITS, ID, ROTATION, ListIndex, list_rows
from datamodules.sources.image_store import ImageStore
from datamodules.sources.layout import Layout, Numbered, Record
from datamodules.sources.pictures import picture

PACKED = (".tar.gz", ".tgz", ".tar")
KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")
TURNS = (90, 180, 270)


@dataclass
class OpenImagesConfig(ImageConversionConfig):
    """Images of Open Images."""

    store: str | None = None
    """Folder of the images, or of tars of them; packed tars (`train_0.tar.gz`) are read in their order; null: the
    folder of the list."""
    narratives: str | None = None
    """Localized Narratives, a file or folder of JSON lines; images without one are then left out."""
    turn: bool = True
    """Turn images as the list's Rotation says (degrees anticlockwise)."""


class OpenImages(Layout[OpenImagesConfig]):
    """Image samples, or caption samples with narratives; licence and author stand in their json."""

    schema = OpenImagesConfig

    def __init__(self, source: Path, config: OpenImagesConfig):
        super().__init__(source, config)
        self.lists = find_files(source, (".csv",))
        place = Path(config.store) if config.store else source if source.is_dir() else source.parent
        self.packed = _packed(place)
        if self.packed:
            self.index = ListIndex(self.lists)
        else:
            self.store = ImageStore(place, config.limits.max_member_bytes)
        self.narratives = _narratives(Path(config.narratives)) if config.narratives else None

    def files(self) -> list[Path]:
        return self.packed or self.lists

    def name_of(self, file: Path) -> str:
        return file.name

    def records(self, file: Path, start: int) -> Numbered:
        return self._members(file, start) if self.packed else list_rows(file, start, file.name)

    def samples(self, record: Record, left_out: Counter[str]) -> Iterable[ImageSample | CaptionSample]:
        if isinstance(record.content, tuple):
            identity, content = record.content
            row = self.index.row(identity)
        else:
            row = record.content
            identity = row[ID]
            if not KEY.fullmatch(identity):
                raise record.error("refused_path", f"ImageID {identity!r:.100} is no plain name")
            content = None
        caption = self.narratives.get(identity) if self.narratives is not None else None
        if self.narratives is not None and not caption:
            raise FilteredSample("no_narrative", record.name, str(record.number), identity)
        if content is None:
            content = self._stored(record, identity)
        image = picture(record, content, identity, self.config, turn=self._turn(row))
        metadata = {name: row[name] for name in CREDITS if row.get(name)} | {"id": identity}
        if caption:
            return [CaptionSample(caption, image, key=identity, metadata=metadata)]
        return [ImageSample(image, key=identity, metadata=metadata)]

    def _stored(self, record: Record, identity: str) -> bytes:
        try:
            return self.store.find(record, f"{identity}.jpg")
        except SampleError as error:
            if error.reason != "missing_image":
                raise
            # Links die: that an image of the list is not there is no fault of those that are.
            raise FilteredSample("missing_image", record.name, str(record.number), identity) from error

    def _turn(self, row: dict[str, str]) -> int:
        try:
            degrees = round(float(row.get(ROTATION) or 0)) % 360
        except (ValueError, OverflowError):
            return 0
        return degrees if self.config.turn and degrees in TURNS else 0

    def _members(self, file: Path, start: int) -> Numbered:
        """Images of a packed tar in their order. Nothing is unpacked to the disk; links and devices are passed over."""
        number, limit = -1, self.config.limits.max_member_bytes
        try:
            with tarfile.open(file, "r|*") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # a large tar's headers would all stay in memory
                    path = PurePosixPath(member.name)
                    if not member.isfile() or path.suffix[1:].lower() not in SUFFIXES:
                        continue
                    number += 1
                    if number < start:
                        continue
                    if not KEY.fullmatch(path.stem):
                        yield number, SampleError("refused_path", file.name, str(number), f"{member.name!r:.100}")
                    elif member.size > limit:
                        detail = f"{member.name} has {member.size} bytes, at most {limit}"
                        yield number, SampleError("member_too_large", file.name, str(number), detail)
                    else:
                        yield number, (path.stem, tar.extractfile(member).read())  # type: ignore[union-attr]
        except (tarfile.TarError, *DAMAGED) as error:
            detail = f"{type(error).__name__}: {error}"
            yield number + 1, SampleError("damaged_file", file.name, str(number + 1), detail)


def _packed(place: Path) -> list[Path]:
    if place.is_file() and place.name.endswith(PACKED):
        return [place]
    return sorted(path for path in place.rglob("*") if path.name.endswith(PACKED[:2])) if place.is_dir() else []


def _narratives(place: Path) -> dict[str, str]:
    """The first caption of every image."""
    captions: dict[str, str] = {}
    for file in find_files(place, (".jsonl",)):
        for number, line in lines(file, 0, 10_000_000, file.name):
            try:
                row: Any = json.loads(line) if isinstance(line, bytes) else None
                captions.setdefault(row["image_id"], row["caption"].strip())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"'{file}', line {number + 1}: no object with image_id and caption ({line!r:.80})."
                ) from error
    return captions
