"""Rows: one image on its way through the stages, as a plain dict.

| key | from | holds |
|---|---|---|
| number, shard, key | reading | place in the chunk; where the image came from |
| data | reading | the encoded image as it was found |
| image | preparation | the square image as it will be stored, encoded |
| caption | reading (`caption.by=given`) or captioning | text |
| answer | entity extraction | what the language model answered |
| entities | entity check | list of dicts: text; heat (segmentation); box, area, mask, background, white (cutting) |
| skipped_entities | entity check, cutting | reason → number of entities |
| dropped | any stage | reason, detail, filtered; the row holds no images any more |
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
    """One step of the curation. It keeps nothing between batches that would change its results."""

    def __call__(self, batch: Batch) -> Batch:
        """Rows that are not dropped → the same rows in order with this step's results, some dropped.

        Any exception makes the batch be tried row by row (`attempt`).
        """
        ...


def new_row(shard: str, key: str) -> Row:
    """A row before anything is known of it."""
    return {"number": 0, "shard": shard, "key": key, "entities": [], "skipped_entities": Counter()}


def drop(row: Row, reason: str, detail: str = "", *, filtered: bool = True) -> Row:
    """The row without its content, dropped for `reason`.

    Args:
        filtered: a sound sample that the configuration excludes; False: a failure, counted towards `max_bad_share`.
    """
    kept = {name: row[name] for name in ("number", "shard", "key", "skipped_entities")}
    return kept | {"dropped": {"reason": reason, "detail": detail[:200], "filtered": filtered}}


def drop_for(row: Row, error: Exception, stage: str) -> Row:
    """The row dropped for an exception: a SampleError's own reason, `<stage>_failed` for any other."""
    if isinstance(error, SampleError):
        return drop(row, error.reason, error.detail, filtered=error.filtered)
    return drop(row, f"{stage}_failed", f"{type(error).__name__}: {error}", filtered=False)


def attempt(name: str, stage: Stage, batch: Batch) -> Batch:
    """A batch through a stage; if that fails, each row alone, and those that fail again are dropped.

    Raises:
        DataError, MemoryError, OutOfMemoryError, AcceleratorError: the machine or the configuration is at fault.
        RuntimeError: the stage lost rows, gave more, or changed their order.
    """
    try:
        result = stage(batch)
    except Exception as error:  # whatever a model, its processor or an image library raises at hostile data
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


CUDA_ERRORS = ("OutOfMemoryError", "AcceleratorError")  # torch's, which is not imported for two names


def row_image(row: Row) -> Image.Image:
    """The prepared image, RGB."""
    return StoredImage(row["image"], "image", row["shard"], row["key"]).load()


def encode_grey(values: np.ndarray) -> bytes:
    """(H, W) uint8, or bool for a mask → PNG."""
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def decode_grey(data: bytes) -> np.ndarray:
    """What `encode_grey` was given."""
    return np.array(Image.open(io.BytesIO(data), formats=("PNG",)))
