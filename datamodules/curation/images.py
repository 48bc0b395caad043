"""Image stages without a model: prepare an image; turn heat maps into masks and crops (paper Fig. 4)."""

import io
from typing import cast

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from datamodules.curation.config import Crops, Stored
from datamodules.curation.rows import Batch, Row, decode_grey, drop, encode_grey, row_image
from datamodules.images import Limits, StoredImage

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are outside


class Prepare:
    """`data` → `image`: the upright centre square, resized to `side` × `side` and encoded as it will be stored."""

    def __init__(self, stored: Stored, limits: Limits):
        self.stored, self.limits = stored, limits

    def __call__(self, batch: Batch) -> Batch:
        """Prepare the batch's images. Raises SampleError if an image cannot be decoded within the limits."""
        return [self._prepare(row) for row in batch]

    def _prepare(self, row: Row) -> Row:
        image = StoredImage(row["data"], row["key"], row["shard"], row["key"], self.limits).load()
        if min(image.size) < self.stored.min_side:
            detail = f"{image.width}×{image.height}, at least {self.stored.min_side} a side"
            return drop(row, "image_too_small", detail)
        size = (self.stored.side, self.stored.side)
        square = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        return {name: value for name, value in row.items() if name != "data"} | {"image": encode(square, self.stored)}


def encode(image: Image.Image, stored: Stored) -> bytes:
    """Encode an RGB image in the stored format."""
    stream = io.BytesIO()
    quality = {} if stored.format == "png" else {"quality": stored.quality}
    # No chroma subsampling, which would mix colours of an entity's edge with the white around it.
    subsampling = {"subsampling": 0} if stored.format == "jpg" else {}
    image.save(stream, FORMATS[stored.format], **quality, **subsampling)
    return stream.getvalue()


class CutEntities:
    """`heat` → `mask`, `box`, `area`, `background`, `white` of each entity; drops rows without crops (`no_crops`).

    Skipped entities are counted as `nothing_found`, `mask_too_small`, `mask_too_large` or `crop_too_small`.
    """

    def __init__(self, crops: Crops, stored: Stored):
        self.crops, self.stored = crops, stored

    def __call__(self, batch: Batch) -> Batch:
        """Cut the entities of the batch's images."""
        return [self._cut(row) for row in batch]

    def _cut(self, row: Row) -> Row:
        image = row_image(row)
        skipped = row["skipped_entities"].copy()
        kept = []
        for entity in row["entities"]:
            mask = largest_region(decode_grey(entity["heat"]), image.width, self.crops.threshold, self.crops.dilation)
            box = square_box(mask)
            if reason := self._skip_reason(mask, box):
                skipped[reason] += 1
                continue
            background, white = crop(image, mask, box)
            cut = {"background": encode(background, self.stored), "white": encode(white, self.stored)}
            area = round(float(mask.mean()), 5)
            kept.append({"text": entity["text"], "box": box, "area": area, "mask": encode_grey(mask), **cut})
        row = row | {"entities": kept, "skipped_entities": skipped}
        return row if kept else drop(row, "no_crops", f"no entity can be cut out: {row['caption']!r}")

    def _skip_reason(self, mask: np.ndarray, box: Box) -> str | None:
        area = mask.mean()
        if not area:
            return "nothing_found"
        if area < self.crops.min_area:
            return "mask_too_small"
        if area > self.crops.max_area:
            return "mask_too_large"
        return "crop_too_small" if box[2] - box[0] < self.crops.min_side else None


def largest_region(heat: np.ndarray, side: int, threshold: float, dilation: float) -> np.ndarray:
    """Return the largest connected region of a heat map (H, W) uint8 above the threshold, as a mask (side, side) bool.

    The mask is dilated first, as in the released code, which joins parts that are a few pixels apart. Regions are
    connected along edges, not corners; of regions of the same size the upper left one is used.
    """
    if heat.shape != (side, side):
        heat = np.asarray(Image.fromarray(heat).resize((side, side), Image.Resampling.BILINEAR))
    mask = heat > threshold * 255
    if (reach := round(dilation * side)) > 1:
        mask = ndimage.binary_dilation(mask, np.ones((reach, reach), bool))
    regions, count = cast(tuple[np.ndarray, int], ndimage.label(mask))
    if not count:
        return mask
    return regions == np.bincount(regions.ravel())[1:].argmax() + 1


def square_box(mask: np.ndarray) -> Box:
    """Return the smallest square around a mask, shifted to lie inside the image; (0, 0, 0, 0) for an empty mask."""
    if not mask.any():
        return (0, 0, 0, 0)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    side, limit = max(bottom - top, right - left), len(mask)
    x, y = (min(max((a + b - side) // 2, 0), limit - side) for a, b in ((left, right), (top, bottom)))
    return (x, y, x + side, y + side)


def crop(image: Image.Image, mask: np.ndarray, box: Box) -> tuple[Image.Image, Image.Image]:
    """Crop the square with its background, and with white outside the mask."""
    background = image.crop(box)
    left, top, right, bottom = box
    inside = Image.fromarray(mask[top:bottom, left:right])
    return background, Image.composite(background, Image.new("RGB", background.size, "white"), inside)
