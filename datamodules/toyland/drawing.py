"""Drawing many samples at once: chunks over processes, in order, the same whatever their number."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datamodules.errors import DataError
from datamodules.images import encode_png
from datamodules.processes import interrupts_held_back
from datamodules.toyland.evaluation_sets import coco_image, subject_images, subject_names
from datamodules.toyland.samples import MAKERS, sample_generator

CHUNK = 64
"""Samples that a process draws between two reports."""

Members = dict[str, bytes]
Draw = Callable[[Iterable["Chunk"]], Iterator[list[Members]]]


@dataclass(frozen=True)
class Chunk:
    """Samples `numbers` of one part's split."""

    part: str
    split: str
    numbers: range
    seed: int
    options: Any


def chunks(part: str, split: str, count: int, seed: int, options: Any) -> list[Chunk]:
    """All samples of a split, in order."""
    starts = range(0, count, CHUNK)
    return [Chunk(part, split, range(start, min(start + CHUNK, count)), seed, options) for start in starts]


def draw_chunk(chunk: Chunk) -> list[Members]:
    """Each sample as files: name or suffix → bytes."""
    return [_draw(chunk, number) for number in chunk.numbers]


def _draw(chunk: Chunk, number: int) -> Members:
    rng = sample_generator(chunk.seed, chunk.part, chunk.split, number)
    if chunk.part == "dreambench":
        kind = list(subject_names(chunk.options).values())[number]
        images = subject_images(rng, kind, chunk.options.images)
        return {f"{i:02d}.png": encode_png(image) for i, image in enumerate(images)}
    if chunk.part == "coco":
        image, line = coco_image(rng, number)
        return {"png": encode_png(image), "txt": line.encode()}
    return MAKERS[chunk.part](rng, chunk.options).encode()


@contextmanager
def drawing(processes: int | None) -> Iterator[Draw]:
    """A function that draws chunks in their order, on `processes` processes (None: one for each CPU core).

    Raises:
        DataError: a process was killed.
    """
    count = processes or os.cpu_count() or 1
    if count == 1:
        yield lambda todo: map(draw_chunk, todo)
        return
    # Spawned, not forked: the parent has threads (progress bar, torch), which a fork would leave half-copied.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context)

    def draw(todo: Iterable[Chunk]) -> Iterator[list[Members]]:
        with interrupts_held_back():
            return pool.map(draw_chunk, todo)  # starts the processes

    try:
        yield draw
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {count} drawing processes was killed, perhaps for want of memory; set processes to fewer and "
            "start again, finished parts are kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
