"""Which stages a curation has, which of them one worker does, and how a chunk goes through them.

A chunk is up to `input.chunk_size` consecutive images of one source and becomes one shard. Batches are cut inside a
chunk, so a shard depends neither on the number of workers nor on the order in which they finish.
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
"""Rows at once of a stage that looks at them one by one."""


@dataclass
class Chunk:
    """Images on their way.

    Attributes:
        source, part: number of the source, and of the chunk in it.
        last: nothing of the source follows.
        timing: stage → rows given to it, seconds.
    """

    source: int
    part: int
    rows: Batch = field(default_factory=list)
    last: bool = False
    timing: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its shard, its record and its keys."""
        return f"{self.source:06d}-{self.part:04d}"


@dataclass(frozen=True)
class Step:
    """A stage that is not built yet.

    Attributes:
        pool: the actors that hold its model; None: it is done by the worker of the step before.
    """

    name: str
    build: Callable[[], Stage]
    batch_size: int = PLAIN_BATCH
    pool: Pool | None = None


def groups(config: Curation) -> list[list[Step]]:
    """All stages after preparation in their order, grouped by the worker that does them.

    The first group is done where images are read, the last one where shards are written, and each one between by the
    actors of its first step. Both ends may be empty.
    """
    model, toyland = partial(_model_step, config), partial(_toyland_step, config)
    on_toyland = config.masks.by == "toyland"
    steps = [model("safety", "SafetyFilter")] if config.safety.enabled else []
    if config.caption.by != "given":
        steps.append(model("caption", "Blip2Captions") if config.caption.by == "blip2" else toyland("caption"))
    steps.append(Step("caption_filter", lambda: CaptionFilter(config.text_filter)))
    asks = config.entities.by == "language_model"
    steps.append(model("entities", "AskLanguageModel") if asks else toyland("entities"))
    steps.append(Step("entity_check", lambda: CheckEntities(config.entities)))
    steps.append(toyland("masks") if on_toyland else model("masks", "ClipSegHeat"))
    listed: list[list[Step]] = [[]]
    for step in steps:
        listed = [*listed, [step]] if step.pool else [*listed[:-1], [*listed[-1], step]]
    cut = Step("cut", lambda: CutEntities(config.crops, config.image))
    return [*listed, [cut, toyland("score")] if on_toyland else [cut]]


# Imported where they are built: transformers and Toyland are loaded by the workers that need them.


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
    """The stages of a group, built; works on one chunk after the other."""

    def __init__(self, steps: list[Step]):
        self.steps = [(step, step.build()) for step in steps]

    def __call__(self, chunk: Chunk) -> Chunk:
        """Take the chunk's rows that are not dropped through the stages. Raises: see `attempt`."""
        for step, stage in self.steps:
            start = time.perf_counter()
            given = [row for row in chunk.rows if "dropped" not in row]
            for first in range(0, len(given), step.batch_size):
                for row in attempt(step.name, stage, given[first : first + step.batch_size]):
                    chunk.rows[row["number"]] = row
            chunk.timing[step.name] = len(given), time.perf_counter() - start
        return chunk


def read_chunks(source: Source, config: Curation, done: Container[int] = ()) -> Iterator[Chunk]:
    """Read and prepare the chunks of a source, at least one, except for those whose part is in `done`.

    An image is prepared as soon as it is read: prepared ones are what a chunk holds in memory.
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
