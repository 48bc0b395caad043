"""Rows: one image on its way through the stages, as a plain dict, so that any engine can carry it.

| key | from | holds |
|---|---|---|
| number, shard, key | reading | place in the chunk; where the image came from |
| data, given | reading | the encoded image as it was found; its caption, where the input has one |
| image | preparation | the square image as it will be stored, encoded |
| caption | captioning | text |
| answer | entity extraction | what the language model said |
| entities | entity check | list of dicts: text; heat (segmentation); mask, box, area, background, white (cutting) |
| lost_entities | entity check, cutting | reason → number of entities left out |
| dropped | any stage | reason, detail, filtered; the row then holds no images any more |

What a chunk carries at any time is therefore some hundred kilobytes a row.
"""

import io
from collections import Counter
from typing import Any, Protocol

import numpy as np
from PIL import Image

from datamodules.errors import SampleError
from datamodules.images import StoredImage

Row = dict[str, Any]
Batch = list[Row]


class Stage(Protocol):
    """One step of the curation. Rows that it is given are not dropped yet; it gives them back in order, some dropped.

    A stage keeps nothing between batches that would change its results.
    """

    def __call__(self, batch: Batch) -> Batch:
        """The rows with this step's results. Raises SampleError or any Exception: the batch is tried row by row."""
        ...


def new_row(number: int, shard: str, key: str) -> Row:
    """A row before anything is known of it."""
    return {"number": number, "shard": shard, "key": key, "lost_entities": Counter()}


def drop(row: Row, reason: str, detail: str = "", *, filtered: bool = True) -> Row:
    """The row without its content, dropped for `reason`.

    Args:
        filtered: a sound sample that the configuration leaves out; False: a fault, counted towards `max_bad_share`.
    """
    kept = {name: row[name] for name in ("number", "shard", "key", "lost_entities")}
    return kept | {"dropped": {"reason": reason, "detail": detail[:200], "filtered": filtered}}


def drop_for(row: Row, error: Exception, stage: str) -> Row:
    """The row dropped for an exception: a SampleError's own reason, `<stage>_failed` for any other."""
    if isinstance(error, SampleError):
        return drop(row, error.reason, error.detail, filtered=error.filtered)
    return drop(row, f"{stage}_failed", f"{type(error).__name__}: {error}", filtered=False)


def alive(rows: Batch) -> Batch:
    """The rows that are not dropped."""
    return [row for row in rows if "dropped" not in row]


def row_image(row: Row) -> Image.Image:
    """The prepared image, RGB."""
    return StoredImage(row["image"], "image", row["shard"], row["key"]).load()


def encode_grey(values: np.ndarray) -> bytes:
    """(H, W) uint8, or bool for a mask → PNG: what maps travel as."""
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def decode_grey(data: bytes) -> np.ndarray:
    """What `encode_grey` was given."""
    return np.array(Image.open(io.BytesIO(data), formats=("PNG",)))
