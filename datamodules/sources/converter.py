"""Base class of converters, which list the files of a data set, read their records and convert these to samples."""

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
    """Raise ValueError if `value` is below `least`."""
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


@dataclass
class ConversionConfig:
    """Settings of all conversions."""

    prefix: str = "train"
    """Prefix of the shards' names."""
    samples_per_shard: int = 1000
    """Samples per shard."""
    processes: int | None = None
    """Number of worker processes; null: one per CPU core. The shards do not depend on it."""
    max_bad_share: float = 0.05
    """The conversion stops if a larger share of the records is unusable (0 … 1). Filtered records do not count."""
    min_bad_count: int = 100
    """Fewer unusable records than this never stop the conversion."""
    max_record_bytes: int = 256_000_000
    """Maximum size in bytes of one line or document of the input, decompressed."""
    limits: Limits = field(default_factory=Limits)
    """Upper limits for one sample."""

    def __post_init__(self):
        for name in ("samples_per_shard", "min_bad_count", "max_record_bytes"):
            at_least(name, getattr(self, name), 1)
        if self.processes is not None:
            at_least("processes", self.processes, 1)
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} must lie in 0 … 1.")


@dataclass
class ImageRules:
    """How images are checked and stored."""

    decode: bool = True
    """Decode every image and drop those that cannot be decoded; false reads only the headers."""
    min_side: int = 0
    """Filter images whose width or height has fewer pixels."""
    shorter_side: int = 0
    """Resize images whose shorter side has more pixels to this side, as JPEG; 0 stores all images unchanged."""
    quality: int = 95
    """Quality of the JPEG files that the conversion writes (1 … 100)."""

    def __post_init__(self):
        for name in ("min_side", "shorter_side"):
            at_least(f"images.{name}", getattr(self, name), 0)
        if not 1 <= self.quality <= 100:
            raise ValueError(f"images.quality={self.quality} must lie in 1 … 100.")


@dataclass
class ImageConversionConfig(ConversionConfig):
    """Settings of conversions with images."""

    images: ImageRules = field(default_factory=ImageRules)
    """How images are checked and stored."""


@dataclass
class Converted:
    """The result of one record: its samples, an error if it is unusable, and parts that were skipped, by reason."""

    file: int
    number: int
    samples: list[Sample] = field(default_factory=list)
    error: SampleError | None = None
    skipped: Counter[str] = field(default_factory=Counter)


Config = TypeVar("Config", bound=ConversionConfig)


class Converter(ABC, Generic[Config]):
    """Base class of converters. By default, the input is tables. Instances are sent to worker processes.

    Args:
        source: file or folder.

    Raises:
        DataError: the source does not have this layout.
    """

    schema: ClassVar[type[ConversionConfig]]
    suffixes: ClassVar[tuple[str, ...]] = TABLE_SUFFIXES
    columns: Sequence[str] = ()
    """Columns to read from Parquet files; empty: all."""

    def __init__(self, source: Path, config: Config):
        self.source, self.config = source, config

    def files(self) -> list[Path]:
        """Return the files of the input in the order of reading."""
        return find_files(self.source, self.suffixes)

    def records(self, file: Path) -> Iterator[Any]:
        """Yield the content of each record, None for a blank line. Runs in a single process, so it should do little."""
        return rows(file, self.config.max_record_bytes, self.columns)

    @abstractmethod
    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[Sample]:
        """Convert one record to samples. Runs in worker processes.

        Raises:
            SampleError: the record is unusable; samples that were yielded before are kept.
        """

    def convert(self, records: list[Record]) -> list[Converted]:
        """Convert records to samples and errors."""
        return [self._convert(record) for record in records]

    def _convert(self, record: Record) -> Converted:
        result = Converted(record.file, record.number)
        try:
            if isinstance(record.content, Unreadable):
                raise record.error(record.content.reason, record.content.detail)
            for part, sample in enumerate(self.samples(record, result.skipped)):
                sample.key = sample.key or f"{record.file:05d}-{record.number:09d}-{part:03d}"
                result.samples.append(sample)
        except SampleError as error:
            result.error = error
        return result


def checked_image(
    record: Record, content: bytes, name: str, config: ImageConversionConfig, *, turn: int = 0, sized: bool = False
) -> StoredImage:
    """Check an encoded image and return the image to store: the same bytes unless it must be resized or rotated.

    Args:
        name: name of the image in messages.
        turn: rotation in degrees counterclockwise, a multiple of 90.
        sized: the caller has already compared `images.min_side` with the size that the data set records.

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
    """Return a copy of `image` with other pixels, as JPEG."""
    stream = io.BytesIO()
    pixels.save(stream, "JPEG", quality=quality)
    return StoredImage(stream.getvalue(), image.name, image.shard, image.key, image.limits)
