"""One image of the input, checked against the rules before it goes into a shard."""

import io

from PIL import Image

from datamodules.errors import FilteredSample
from datamodules.images import StoredImage
from datamodules.sources.config import ImageConversionConfig
from datamodules.sources.layout import Record


def picture(
    record: Record, content: bytes, name: str, config: ImageConversionConfig, *, turn: int = 0, sized: bool = False
) -> StoredImage:
    """Bytes → the image to store, as they are unless it must be reduced or turned.

    Args:
        name: what the image is called in messages.
        turn: degrees anticlockwise, a multiple of 90.
        sized: the layout has held `images.min_side` against the size that it records.

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
        detail = f"{name}: {width}×{height}, at least {rules.min_side} a side"
        raise FilteredSample("image_too_small", record.name, str(record.number), detail)
    reduce = rules.shorter_side and min(width, height) > rules.shorter_side
    if not (rules.decode or reduce or turn):
        return image
    pixels = image.load()
    if not (reduce or turn):
        return image
    if turn:
        pixels = pixels.transpose({90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180}.get(
            turn, Image.Transpose.ROTATE_270))  # fmt: skip
    if reduce:
        scale = rules.shorter_side / min(pixels.size)
        size = tuple(max(rules.shorter_side, round(side * scale)) for side in pixels.size)
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    stream = io.BytesIO()
    pixels.save(stream, "JPEG", quality=rules.quality)
    return StoredImage(stream.getvalue(), name, record.name, str(record.number), limits)
