"""Decoding within bounds, the centre square, the stored size: what every later stage and the training see."""

import io

from PIL import Image, ImageOps

from datamodules.curation.config import Stored
from datamodules.curation.rows import Batch, Row, drop, drop_for
from datamodules.errors import SampleError
from datamodules.images import Limits, StoredImage

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


class Prepare:
    """`data` → `image`: upright, centre square, `side` × `side`, encoded as it will be stored."""

    def __init__(self, stored: Stored, limits: Limits):
        self.stored, self.limits = stored, limits

    def __call__(self, batch: Batch) -> Batch:
        """Decode and encode; a broken or small image is dropped."""
        return [self._prepare(row) for row in batch]

    def _prepare(self, row: Row) -> Row:
        encoded = StoredImage(row["data"], row["key"], row["shard"], row["key"], self.limits)
        try:
            image = encoded.load()
        except SampleError as error:
            return drop_for(row, error, "preparation")
        if min(image.size) < self.stored.min_side:
            detail = f"{image.width}×{image.height}, at least {self.stored.min_side} a side"
            return drop(row, "image_too_small", detail)
        kept = {name: value for name, value in row.items() if name != "data"}
        return kept | {"image": encode(square(image, self.stored.side), self.stored)}


def square(image: Image.Image, side: int) -> Image.Image:
    """The centre square at `side` pixels; not resampled where it is so already."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def encode(image: Image.Image, stored: Stored) -> bytes:
    """An RGB image in the stored format."""
    stream = io.BytesIO()
    quality = {} if stored.format == "png" else {"quality": stored.quality}
    # Colour at full resolution: on white, an entity's edge would take its neighbour's.
    full_colour = {"subsampling": 0} if stored.format == "jpg" else {}
    image.save(stream, FORMATS[stored.format], **quality, **full_colour)
    return stream.getvalue()
