"""Interleaved documents: MMC4 (sentences, each image assigned to one) and OBELICS (aligned lists of texts and images).

Both publish the texts and the addresses of the images; the images are those in `store`, found by file name or by URL.
One that is missing or broken is skipped and counted, the document is kept.
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
    """Documents of texts and images."""

    min_images: int = 1
    """Documents with fewer images that can be used are filtered."""
    max_images: int = 30
    """Documents with more images are filtered."""

    def __post_init__(self):
        super().__post_init__()
        at_least("min_images", self.min_images, 0)
        at_least("max_images", self.max_images, max(1, self.min_images))


@dataclass
class Mmc4Config(InterleavedConfig):
    """MMC4's documents."""

    min_similarity: float = 0.0
    """Images whose `matched_sim` to their sentence is lower are skipped (OpenFlamingo and others take 0.24)."""
    image_first: bool = True
    """An image stands before the sentence that it is assigned to, not after it."""
    drop_url_duplicates: bool = False
    """Filter documents that MMC4 marks as `could_have_url_duplicate`."""


class Interleaved(StoreConverter[InterleavedConfig]):
    """What both sets share."""

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
        """Texts and images in reading order."""

    def found(self, record: Record, skipped: Counter[str], *values: Any) -> Iterator[StoredImage]:
        """The image, or nothing and a count; see `ImageStore.image`."""
        try:
            yield self.store.image(record, self.config, *values)
        except SampleError as error:
            skipped[error.reason] += 1


class Mmc4(Interleaved):
    """`text_list`, `image_info` with `image_name`, `raw_url` and `matched_text_index`."""

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
            images = [found for names in assigned.get(index, ()) for found in self.found(record, skipped, *names)]
            run += [] if images and self.config.image_first else [text]
            if images:
                yield " ".join(run)
                yield from images
                run = [text] if self.config.image_first else []
        yield " ".join(run)


class Obelics(Interleaved):
    """`images` and `texts`, as long as each other: at every place one of the two, the other null."""

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
                yield from self.found(record, skipped, image)
            elif text is not None:
                yield text_of(record, text, "texts")
