"""What a converter is: it lists the files of a published set, reads their records, and makes samples of a record."""

import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from PIL import Image

from datamodules.errors import SampleError
from datamodules.images import Limits, StoredImage
from datamodules.sample import Sample
from datamodules.sources.files import Record, Unreadable, find_files
from datamodules.sources.tables import TABLE_SUFFIXES, rows

ROTATIONS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def at_least(name: str, value: float, least: float) -> None:
    """Raises ValueError naming key, value and what is allowed."""
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


@dataclass
class ConversionConfig:
    """How any set is converted."""

    prefix: str = "train"
    """First part of the shards' names."""
    samples_per_shard: int = 1000
    """Samples in one tar file."""
    processes: int | None = None
    """Processes that convert; null takes one for each CPU core. The shards do not depend on it."""
    max_bad_share: float = 0.05
    """The conversion stops if a larger share of the records is unusable (0 … 1); filtered ones are no failures."""
    min_bad_count: int = 100
    """Fewer unusable records than this never stop it."""
    max_record_bytes: int = 256_000_000
    """Most bytes of one line or document of the input, decompressed."""
    limits: Limits = field(default_factory=Limits)
    """What one sample may cost."""

    def __post_init__(self):
        for name in ("samples_per_shard", "min_bad_count", "max_record_bytes"):
            at_least(name, getattr(self, name), 1)
        if self.processes is not None:
            at_least("processes", self.processes, 1)
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} must lie in 0 … 1.")


@dataclass
class ImageRules:
    """What is done to every image."""

    decode: bool = True
    """Decode each image now and drop what cannot be decoded; false looks at headers alone."""
    min_side: int = 0
    """Pixels; images with a smaller width or height are filtered."""
    shorter_side: int = 0
    """Pixels; an image whose shorter side is longer is reduced to it, as JPEG; 0 stores all images as they are."""
    quality: int = 95
    """Of the JPEG files that the conversion writes (1 … 100)."""

    def __post_init__(self):
        for name in ("min_side", "shorter_side"):
            at_least(f"images.{name}", getattr(self, name), 0)
        if not 1 <= self.quality <= 100:
            raise ValueError(f"images.quality={self.quality} must lie in 1 … 100.")


@dataclass
class ImageConversionConfig(ConversionConfig):
    """How a set with images is converted."""

    images: ImageRules = field(default_factory=ImageRules)
    """What is done to every image."""


@dataclass
class Converted:
    """The samples of one record, why there are no more, and what was skipped of samples that are kept, by reason."""

    file: int
    number: int
    samples: list[Sample] = field(default_factory=list)
    error: SampleError | None = None
    skipped: Counter[str] = field(default_factory=Counter)


Config = TypeVar("Config", bound=ConversionConfig)


class Converter(ABC, Generic[Config]):
    """Converts one published set, by default of tables. Sent to worker processes, so it holds plain values.

    Args:
        source: file or folder.

    Raises:
        DataError: the source is not of this layout.
    """

    schema: ClassVar[type[ConversionConfig]]
    suffixes: ClassVar[tuple[str, ...]] = TABLE_SUFFIXES
    columns: Sequence[str] = ()
    """What is read of Parquet files; none: everything."""

    def __init__(self, source: Path, config: Config):
        self.source, self.config = source, config

    def files(self) -> list[Path]:
        """The input's files in the order of reading."""
        return find_files(self.source, self.suffixes)

    def records(self, file: Path) -> Iterator[Any]:
        """What each record holds; None for a blank line. As little work as possible: it runs in one process."""
        return rows(file, self.config.max_record_bytes, self.columns)

    @abstractmethod
    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[Sample]:
        """The samples of one record; runs in a worker process.

        Raises:
            SampleError: the record is unusable; samples given before are kept.
        """

    def convert(self, records: list[Record]) -> list[Converted]:
        """Records → samples and errors."""
        return [self._converted(record) for record in records]

    def _converted(self, record: Record) -> Converted:
        done = Converted(record.file, record.number)
        try:
            if isinstance(record.content, Unreadable):
                raise record.error(record.content.reason, record.content.detail)
            for part, sample in enumerate(self.samples(record, done.skipped)):
                sample.key = sample.key or f"{record.file:05d}-{record.number:09d}-{part:03d}"
                done.samples.append(sample)
        except SampleError as error:
            done.error = error
        return done


def checked_image(
    record: Record, content: bytes, name: str, config: ImageConversionConfig, *, turn: int = 0, sized: bool = False
) -> StoredImage:
    """Bytes → the image to store, as they are unless it must be reduced or turned.

    Args:
        name: what the image is called in messages.
        turn: degrees anticlockwise, a multiple of 90.
        sized: the caller has compared `images.min_side` with the size that the set records.

    Raises:
        SampleError: `member_too_large`, `unreadable_image`, `image_too_large` or `extreme_aspect_ratio`.
        FilteredSample: `image_too_small`.
    """
    rules, limits = config.images, config.limits
    if len(content) > limits.max_member_bytes:
        raise record.error("member_too_large", f"{name} has {len(content)} bytes, at most {limits.max_member_bytes}")
    image = StoredImage(content, name, record.name, str(record.number), limits)
    width, height = image.size()
    if min(width, height) < rules.min_side and not sized:
        raise record.filtered("image_too_small", f"{name}: {width}×{height}, at least {rules.min_side} a side")
    reduce = rules.shorter_side and min(width, height) > rules.shorter_side
    if not (rules.decode or reduce or turn):
        return image
    pixels = image.load()
    if not (reduce or turn):
        return image
    if turn:
        pixels = pixels.transpose(ROTATIONS[turn])
    if reduce:
        scale = rules.shorter_side / min(pixels.size)
        width, height = (max(rules.shorter_side, round(side * scale)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    return as_jpeg(image, pixels, rules.quality)


def as_jpeg(image: StoredImage, pixels: Image.Image, quality: int) -> StoredImage:
    """Other pixels in the place of an image's."""
    stream = io.BytesIO()
    pixels.save(stream, "JPEG", quality=quality)
    return StoredImage(stream.getvalue(), image.name, image.shard, image.key, image.limits)
