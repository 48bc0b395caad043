"""Rows: dicts that each describe one image and pass through the stages.

| key | from | holds |
|---|---|---|
| number, shard, key | reading | place in the chunk; origin of the image |
| data | reading | the encoded image as read |
| image | preparation | the square image as it will be stored, encoded |
| caption | reading (`caption.by=given`) or captioning | text |
| answer | entity extraction | answer of the language model |
| entities | entity check | list of dicts: text; heat (segmentation); box, area, mask, background, white (cutting) |
| skipped_entities | entity check, cutting | reason → number of entities |
| dropped | any stage | reason, detail, filtered; the row then has no images |
"""

import io
from collections import Counter
from typing import Any, Protocol

import numpy as np
from PIL import Image

from datamodules.errors import DataError, SampleError
from datamodules.images import StoredImage

Row = dict[str, Any]
Batch = list[Row]


class Stage(Protocol):
    """One step of the curation. The result of a batch must not depend on earlier batches."""

    def __call__(self, batch: Batch) -> Batch:
        """Return the given rows in order, with the results of this step; some may be dropped.

        After an exception, the batch is tried again row by row (`attempt`).
        """
        ...


def new_row(shard: str, key: str) -> Row:
    """Return the row of an image that has not been read yet."""
    return {"number": 0, "shard": shard, "key": key, "entities": [], "skipped_entities": Counter()}


def drop(row: Row, reason: str, detail: str = "", *, filtered: bool = True) -> Row:
    """Mark a row as dropped for `reason` and remove its content.

    Args:
        filtered: True for a valid image that the configuration excludes; False for a failure, which counts towards
            `max_bad_share`.
    """
    kept = {name: row[name] for name in ("number", "shard", "key", "skipped_entities")}
    return kept | {"dropped": {"reason": reason, "detail": detail[:200], "filtered": filtered}}


def drop_for(row: Row, error: Exception, stage: str) -> Row:
    """Drop a row because of an exception: the reason is that of a SampleError, else `<stage>_failed`."""
    if isinstance(error, SampleError):
        return drop(row, error.reason, error.detail, filtered=error.filtered)
    return drop(row, f"{stage}_failed", f"{type(error).__name__}: {error}", filtered=False)


def attempt(name: str, stage: Stage, batch: Batch) -> Batch:
    """Run a stage on a batch. If it fails, run it on each row, and drop the rows that fail again.

    Raises:
        DataError, MemoryError, OutOfMemoryError, AcceleratorError: errors of the configuration or the machine.
        RuntimeError: the stage removed, added or reordered rows.
    """
    try:
        result = stage(batch)
    except Exception as error:  # malformed data can raise almost any exception in models, processors and Pillow
        if isinstance(error, (DataError, MemoryError)) or type(error).__name__ in CUDA_ERRORS:
            raise
        if len(batch) == 1:
            return [drop_for(batch[0], error, name)]
        return [row for single in batch for row in attempt(name, stage, [single])]
    if [row["number"] for row in result] != [row["number"] for row in batch]:
        raise RuntimeError(
            f"stage '{name}' must return its rows in order; it got {len(batch)}, returned {len(result)}."
        )
    return result


CUDA_ERRORS = ("OutOfMemoryError", "AcceleratorError")  # names of torch's errors, to avoid the import of torch


def row_image(row: Row) -> Image.Image:
    """Decode the prepared image of a row, RGB."""
    return StoredImage(row["image"], "image", row["shard"], row["key"]).load()


def encode_grey(values: np.ndarray) -> bytes:
    """Encode a map (H, W) uint8 or a mask (H, W) bool as PNG."""
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def decode_grey(data: bytes) -> np.ndarray:
    """Decode the result of `encode_grey`."""
    return np.array(Image.open(io.BytesIO(data), formats=("PNG",)))
