"""Interleaved documents: MMC4 (sentences, each image assigned to one) and OBELICS (aligned lists of texts and images).

Both publish the texts and where the images were; the images are those that are beside (`images`), found by file name or
by URL. One that is missing or broken is left out and counted, the document is kept.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.errors import FilteredSample, SampleError
from datamodules.images import StoredImage
from datamodules.sample import InterleavedSample
from datamodules.sources.config import ImageConversionConfig, at_least
from datamodules.sources.files import find_files
from datamodules.sources.image_store import ImageStore
from datamodules.sources.layout import Layout, Numbered, Record
from datamodules.sources.pictures import picture
from datamodules.sources.tables import TABLE_SUFFIXES, list_of, parse, rows, text_of


@dataclass
class InterleavedConfig(ImageConversionConfig):
    """Documents of texts and images."""

    store: str | None = None
    """Folder of images, of tars of images or of img2dataset's shards; null: the folder of the documents."""
    min_images: int = 1
    """Documents with fewer images, counted after those that are missing, are left out."""
    max_images: int = 30
    """Documents with more images are left out."""

    def __post_init__(self):
        super().__post_init__()
        at_least("min_images", self.min_images, 0)
        at_least("max_images", self.max_images, max(1, self.min_images))


@dataclass
class Mmc4Config(InterleavedConfig):
    """MMC4's documents."""

    min_similarity: float = 0.0
    """Images whose `matched_sim` to their sentence is lower are left out (OpenFlamingo and others take 0.24)."""
    image_first: bool = True
    """An image stands before the sentence that it is assigned to, not after it."""
    drop_url_duplicates: bool = False
    """Leave out documents that MMC4 marks as `could_have_url_duplicate`."""


class Interleaved(Layout[InterleavedConfig]):
    """What both layouts share."""

    schema = InterleavedConfig
    columns: tuple[str, ...]

    def __init__(self, source: Path, config: InterleavedConfig):
        super().__init__(source, config)
        beside = source if source.is_dir() else source.parent
        self.store = ImageStore(Path(config.store) if config.store else beside, config.limits.max_member_bytes)

    def files(self) -> list[Path]:
        return find_files(self.source, TABLE_SUFFIXES)

    def records(self, file: Path, start: int) -> Numbered:
        return rows(file, start, self.config.max_record_bytes, self.name_of(file), self.columns)

    def samples(self, record: Record, left_out: Counter[str]) -> Iterable[InterleavedSample]:
        segments: list[str | StoredImage] = []
        for item in self.items(record, parse(record), left_out):
            if not isinstance(item, str):
                segments.append(item)
            elif item.strip():
                segments.append(item.strip())
        images = sum(not isinstance(segment, str) for segment in segments)
        if not self.config.min_images <= images <= self.config.max_images:
            allowed = f"allowed {self.config.min_images} … {self.config.max_images}"
            raise FilteredSample("image_count", record.name, str(record.number), f"{images} images, {allowed}")
        if images == len(segments):
            raise record.error("empty_text", "the document has no text")
        return [InterleavedSample(list(segments))]

    @abstractmethod
    def items(self, record: Record, row: dict, left_out: Counter[str]) -> Iterator[str | StoredImage]:
        """Texts and images in reading order."""

    def found(self, record: Record, image: Any, left_out: Counter[str]) -> Iterator[StoredImage]:
        """The image, or nothing and a count: `image` is a name, a URL, or bytes as Parquet may hold them."""
        try:
            if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
                yield picture(record, image["bytes"], str(image.get("path"))[:200], self.config)
            else:
                name = text_of(record, image, "image")
                yield picture(record, self.store.find(record, name), name[:200], self.config)
        except SampleError as error:
            left_out[error.reason] += 1


class Mmc4(Interleaved):
    """`text_list`, `image_info` with `image_name` and `matched_text_index`; JSON lines, plain, zipped or in gzip."""

    schema = Mmc4Config
    config: Mmc4Config
    columns = ("text_list", "image_info", "could_have_url_duplicate")

    def items(self, record: Record, row: dict, left_out: Counter[str]) -> Iterator[str | StoredImage]:
        if self.config.drop_url_duplicates and row.get("could_have_url_duplicate"):
            raise FilteredSample("url_duplicate", record.name, str(record.number))
        texts = [text_of(record, text, "text_list") for text in list_of(record, row.get("text_list"), "text_list")]
        assigned: dict[int, list[Any]] = {}
        for info in list_of(record, row.get("image_info"), "image_info"):
            index = info.get("matched_text_index") if isinstance(info, dict) else None
            if not isinstance(index, int) or not 0 <= index < len(texts):
                left_out["invalid_text_index"] += 1
            elif (info.get("matched_sim") or 0) < self.config.min_similarity:
                left_out["low_similarity"] += 1
            else:
                assigned.setdefault(index, []).append(info.get("image_name"))
        run: list[str] = []
        for index, text in enumerate(texts):
            images = [found for name in assigned.get(index, ()) for found in self.found(record, name, left_out)]
            run += [] if images and self.config.image_first else [text]
            if images:
                yield " ".join(run)
                yield from images
                run = [text] if self.config.image_first else []
        yield " ".join(run)


class Obelics(Interleaved):
    """`images` and `texts`, as long as each other: at every place one of the two, the other null."""

    columns = ("images", "texts")

    def items(self, record: Record, row: dict, left_out: Counter[str]) -> Iterator[str | StoredImage]:
        images = list_of(record, row.get("images"), "images")
        texts = list_of(record, row.get("texts"), "texts")
        if len(images) != len(texts):
            raise record.error("misaligned_document", f"{len(images)} images and {len(texts)} texts")
        for image, text in zip(images, texts, strict=True):
            if image is not None and text is not None:
                raise record.error("misaligned_document", "an image and a text at the same place")
            if image is not None:
                yield from self.found(record, image, left_out)
            elif text is not None:
                yield text_of(record, text, "texts")
