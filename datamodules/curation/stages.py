"""The stages of a curation, their division into groups of one worker each, and the processing of a chunk.

A chunk is up to `input.chunk_size` consecutive images of one source and becomes one shard. A batch never spans chunks,
so a shard depends neither on the number of workers nor on the order in which they finish.
"""

import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from datamodules.curation.config import Curation, Pool
from datamodules.curation.images import CutEntities, Prepare
from datamodules.curation.reading import Source, read_rows
from datamodules.curation.rows import Batch, Stage, attempt
from datamodules.curation.text import CaptionFilter, CheckEntities

PLAIN_BATCH = 64
"""Batch size of stages without a model."""


@dataclass
class Chunk:
    """Images that are processed together.

    Attributes:
        source, part: number of the source, and of the chunk in the source.
        last: whether this is the last chunk of the source.
        timing: stage → number of rows processed, seconds.
    """

    source: int
    part: int
    rows: Batch = field(default_factory=list)
    last: bool = False
    timing: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the chunk's shard and record, and prefix of its keys."""
        return f"{self.source:06d}-{self.part:04d}"


@dataclass(frozen=True)
class Step:
    """A stage and how to build it.

    Attributes:
        pool: the actors that run its model; None if it runs in the worker of the previous step.
    """

    name: str
    build: Callable[[], Stage]
    batch_size: int = PLAIN_BATCH
    pool: Pool | None = None


def groups(config: Curation) -> list[list[Step]]:
    """Return all stages after preparation in order, grouped by the worker that runs them.

    The first group runs in the tasks that read images, the last one in the tasks that write shards, and every other one
    in the actors of its first step. The first and the last group may be empty.
    """
    model, toyland = partial(_model_step, config), partial(_toyland_step, config)
    on_toyland = config.masks.by == "toyland"
    steps = [model("safety", "SafetyFilter")] if config.safety.enabled else []
    if config.caption.by != "given":
        steps.append(model("caption", "Blip2Captions") if config.caption.by == "blip2" else toyland("caption"))
    steps.append(Step("caption_filter", lambda: CaptionFilter(config.text_filter)))
    by_model = config.entities.by == "language_model"
    steps.append(model("entities", "AskLanguageModel") if by_model else toyland("entities"))
    steps.append(Step("entity_check", lambda: CheckEntities(config.entities)))
    steps.append(toyland("masks") if on_toyland else model("masks", "ClipSegHeat"))
    grouped: list[list[Step]] = [[]]
    for step in steps:
        grouped = [*grouped, [step]] if step.pool else [*grouped[:-1], [*grouped[-1], step]]
    cut = Step("cut", lambda: CutEntities(config.crops, config.image))
    return [*grouped, [cut, toyland("score")] if on_toyland else [cut]]


# Imports are inside `build`, so that only the workers that need transformers or Toyland import them.


def _model_step(config: Curation, name: str, stage: str) -> Step:
    def build() -> Stage:
        from datamodules.curation import models

        return getattr(models, stage)(options, config.device)

    options = getattr(config, name)
    return Step(name, build, options.batch_size, options.pool)


def _toyland_step(config: Curation, name: str) -> Step:
    def build() -> Stage:
        from datamodules.curation.toyland import GroundTruth

        return getattr(GroundTruth(config.toyland, config.seed), name)

    return Step(name, build)


class Worker:
    """Builds the stages of a group and runs them on one chunk after the other."""

    def __init__(self, steps: list[Step]):
        self.steps = [(step, step.build()) for step in steps]

    def __call__(self, chunk: Chunk) -> Chunk:
        """Run the stages on the chunk's rows that are not dropped. Raises errors as `attempt` does."""
        for step, stage in self.steps:
            start = time.perf_counter()
            remaining = [row for row in chunk.rows if "dropped" not in row]
            for first in range(0, len(remaining), step.batch_size):
                for row in attempt(step.name, stage, remaining[first : first + step.batch_size]):
                    chunk.rows[row["number"]] = row
            chunk.timing[step.name] = len(remaining), time.perf_counter() - start
        return chunk


def read_chunks(source: Source, config: Curation, done: Container[int] = ()) -> Iterator[Chunk]:
    """Read and prepare the chunks of a source, at least one, except for those whose part is in `done`.

    Each image is prepared as soon as it is read, so that a chunk holds only prepared images in memory.
    """
    prepare = Prepare(config.image, config.input.limits)
    rows = read_rows(source, config.input, given=config.caption.by == "given")
    row = next(rows, None)
    for part in count():
        chunk, start = Chunk(source.number, part), time.perf_counter()
        for number in range(config.input.chunk_size):
            if row is None:
                break
            row["number"] = number
            if part not in done:
                chunk.rows += [row] if "dropped" in row else attempt("prepare", prepare, [row])
            row = next(rows, None)
        chunk.last = row is None
        chunk.timing["prepare"] = len(chunk.rows), time.perf_counter() - start
        if part not in done:
            yield chunk
        if chunk.last:
            return
