"""Images of samples: stored encoded and decoded on demand, within limits."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from datamodules.errors import SampleError
from kosmosg.image_processing import LONGEST_ASPECT, rgb

T = TypeVar("T")
SUFFIXES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass
class Limits:
    """Upper limits for one sample. Images are checked by their header, before any pixel is decoded."""

    max_pixels: int = 64_000_000
    """Maximum number of pixels of an image."""
    max_aspect_ratio: float = 32.0
    """Maximum ratio of the sides. Scaling the shorter side of a 1×60000 image to 224 would need too much memory."""
    max_member_bytes: int = 32_000_000
    """Maximum size in bytes of a file inside a shard."""

    def __post_init__(self):
        for name in ("max_pixels", "max_aspect_ratio", "max_member_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name}={getattr(self, name)} must be at least 1.")
        if self.max_aspect_ratio > LONGEST_ASPECT:
            raise ValueError(
                f"limits.max_aspect_ratio={self.max_aspect_ratio} must be at most {LONGEST_ASPECT}, the limit of the "
                "model's image processing."
            )


@dataclass(slots=True)
class StoredImage:
    """An encoded image and its origin. The format (JPEG, PNG or WebP) is detected by content, not by suffix."""

    data: bytes
    name: str
    shard: str
    key: str
    limits: Limits = field(default_factory=Limits)

    def load(self) -> Image.Image:
        """Decode to RGB: the first frame of an animation, transparency on white, rotated as the EXIF data say.

        Raises:
            SampleError: `unreadable_image`, `image_too_large` or `extreme_aspect_ratio`.
        """
        image = self._guard(lambda: Image.open(io.BytesIO(self.data), formats=FORMATS))
        width, height = image.size
        if width * height > self.limits.max_pixels:
            raise self._error("image_too_large", f"{width}×{height}, at most {self.limits.max_pixels} pixels")
        if max(width, height) > self.limits.max_aspect_ratio * min(width, height):
            raise self._error("extreme_aspect_ratio", f"{width}×{height}, at most 1:{self.limits.max_aspect_ratio:g}")
        self._guard(image.load)
        return self._guard(lambda: rgb(image))

    def size(self) -> tuple[int, int]:
        """Return (width, height) in pixels, read from the header.

        Raises:
            SampleError: `unreadable_image` or `image_too_large`.
        """
        return self._guard(lambda: Image.open(io.BytesIO(self.data), formats=FORMATS)).size

    def _guard(self, decode: Callable[[], T]) -> T:
        try:
            return decode()
        except Image.DecompressionBombError as error:
            raise self._error("image_too_large", str(error)) from error
        except UnidentifiedImageError as error:  # its message contains only an address in memory
            raise self._error("unreadable_image", f"not one of {', '.join(FORMATS)}") from error
        except Exception as error:  # on malformed data, Pillow's decoders raise almost any exception
            raise self._error("unreadable_image", f"{type(error).__name__}: {error}") from error

    def _error(self, reason: str, detail: str) -> SampleError:
        return SampleError(reason, self.shard, self.key, f"{self.name}: {detail}")


SampleImage = Image.Image | StoredImage


def load(image: SampleImage) -> Image.Image:
    """Return a sample's image as RGB, decoded if necessary."""
    return image.load() if isinstance(image, StoredImage) else rgb(image)


def suffix_of(image: SampleImage) -> str:
    """Return the file suffix of `encode_png`'s result: jpg, webp or png."""
    if not isinstance(image, StoredImage):
        return "png"
    if image.data.startswith(b"\xff\xd8"):
        return "jpg"
    return "webp" if image.data[:4] == b"RIFF" and image.data[8:12] == b"WEBP" else "png"


def encode_png(image: SampleImage) -> bytes:
    """Encode an image as PNG; an image that is already encoded keeps its bytes."""
    if isinstance(image, StoredImage):
        return image.data
    stream = io.BytesIO()
    rgb(image).save(stream, "PNG")
    return stream.getvalue()
