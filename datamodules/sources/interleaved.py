"""Interleaved documents: MMC4 (images assigned to sentences) and OBELICS (aligned lists of texts and images).

Both are published as texts and URLs of images. The images are read from `store`, by file name or URL. Missing and
unreadable images are skipped and counted; the rest of the document is used.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from datamodules.errors import SampleError
from datamodules.images import SampleImage, StoredImage
from datamodules.sample import InterleavedSample
from datamodules.sources.converter import at_least
from datamodules.sources.files import Record
from datamodules.sources.image_store import StoreConfig, StoreConverter
from datamodules.sources.tables import list_of, parse, text_of


@dataclass
class InterleavedConfig(StoreConfig):
    """Settings of interleaved documents."""

    min_images: int = 1
    """Filter documents with fewer usable images."""
    max_images: int = 30
    """Filter documents with more images."""

    def __post_init__(self):
        super().__post_init__()
        at_least("min_images", self.min_images, 0)
        at_least("max_images", self.max_images, max(1, self.min_images))


@dataclass
class Mmc4Config(InterleavedConfig):
    """Settings of MMC4."""

    min_similarity: float = 0.0
    """Skip images whose `matched_sim` to their sentence is lower (OpenFlamingo and others use 0.24)."""
    image_first: bool = True
    """Place an image before the sentence to which it is assigned instead of after it."""
    drop_url_duplicates: bool = False
    """Filter documents that MMC4 marks as `could_have_url_duplicate`."""


class Interleaved(StoreConverter[InterleavedConfig]):
    """Base class of both converters."""

    schema = InterleavedConfig

    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[InterleavedSample]:
        segments: list[str | SampleImage] = []
        for item in self.items(record, parse(record), skipped):
            text = item.strip() if isinstance(item, str) else item
            segments += [text] if text else []
        images = sum(not isinstance(segment, str) for segment in segments)
        if not self.config.min_images <= images <= self.config.max_images:
            allowed = f"allowed {self.config.min_images} … {self.config.max_images}"
            raise record.filtered("image_count", f"{images} images, {allowed}")
        if images == len(segments):
            raise record.error("empty_text", "the document has no text")
        return [InterleavedSample(segments)]

    @abstractmethod
    def items(self, record: Record, row: dict, skipped: Counter[str]) -> Iterator[str | StoredImage]:
        """Yield texts and images in reading order."""

    def find_image(self, record: Record, skipped: Counter[str], *values: Any) -> Iterator[StoredImage]:
        """Yield an image (see `ImageStore.image`), or nothing if it is unusable, which is counted in `skipped`."""
        try:
            yield self.store.image(record, self.config, *values)
        except SampleError as error:
            skipped[error.reason] += 1


class Mmc4(Interleaved):
    """Converts MMC4: `text_list`, and `image_info` with `image_name`, `raw_url` and `matched_text_index`."""

    schema = Mmc4Config
    config: Mmc4Config
    columns = ("text_list", "image_info", "could_have_url_duplicate")

    def items(self, record: Record, row: dict, skipped: Counter[str]) -> Iterator[str | StoredImage]:
        if self.config.drop_url_duplicates and row.get("could_have_url_duplicate"):
            raise record.filtered("url_duplicate")
        texts = [text_of(record, text, "text_list") for text in list_of(record, row.get("text_list"), "text_list")]
        assigned: dict[int, list[tuple]] = {}
        for info in list_of(record, row.get("image_info"), "image_info"):
            index = info.get("matched_text_index") if isinstance(info, dict) else None
            similarity = info.get("matched_sim") or 0 if isinstance(info, dict) else None
            if not isinstance(index, int) or not 0 <= index < len(texts) or not isinstance(similarity, int | float):
                skipped["invalid_text_index"] += 1
            elif similarity < self.config.min_similarity:
                skipped["low_similarity"] += 1
            else:
                assigned.setdefault(index, []).append((info.get("image_name"), info.get("raw_url")))
        run: list[str] = []
        for index, text in enumerate(texts):
            images = [image for names in assigned.get(index, ()) for image in self.find_image(record, skipped, *names)]
            run += [] if images and self.config.image_first else [text]
            if images:
                yield " ".join(run)
                yield from images
                run = [text] if self.config.image_first else []
        yield " ".join(run)


class Obelics(Interleaved):
    """Converts OBELICS: lists `images` and `texts` of the same length, of which one is null at every position."""

    columns = ("images", "texts")

    def items(self, record: Record, row: dict, skipped: Counter[str]) -> Iterator[str | StoredImage]:
        images = list_of(record, row.get("images"), "images")
        texts = list_of(record, row.get("texts"), "texts")
        if len(images) != len(texts):
            raise record.error("misaligned_document", f"{len(images)} images and {len(texts)} texts")
        for image, text in zip(images, texts, strict=True):
            if image is not None and text is not None:
                raise record.error("misaligned_document", "an image and a text at the same place")
            if image is not None:
                yield from self.find_image(record, skipped, image)
            elif text is not None:
                yield text_of(record, text, "texts")
