"""What every conversion can be told; each layout's own schema extends one of these."""

from dataclasses import dataclass, field

from datamodules.images import Limits


@dataclass
class ConversionConfig:
    """How any layout is converted."""

    prefix: str = "train"
    """First part of the shards' names."""
    samples_per_shard: int = 1000
    """Samples in one tar file."""
    processes: int | None = None
    """Processes that decode; null takes one for each CPU core. The shards do not depend on it."""
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
    """Decode each image now and leave out what cannot be decoded; false looks at headers alone."""
    min_side: int = 0
    """Pixels; images with a smaller width or height are left out."""
    shorter_side: int = 0
    """Pixels; an image whose shorter side is longer is reduced to it, as JPEG; 0 stores all images as they are."""
    quality: int = 95
    """Of the JPEG files written by `shorter_side` (1 … 100)."""

    def __post_init__(self):
        for name in ("min_side", "shorter_side"):
            at_least(f"images.{name}", getattr(self, name), 0)
        if not 1 <= self.quality <= 100:
            raise ValueError(f"images.quality={self.quality} must lie in 1 … 100.")


@dataclass
class ImageConversionConfig(ConversionConfig):
    """How a layout with images is converted."""

    images: ImageRules = field(default_factory=ImageRules)
    """What is done to every image."""


def at_least(name: str, value: float, least: float) -> None:
    """Raises ValueError naming key, value and what is allowed."""
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")
