"""Working on a chunk: which stages there are, in which groups, and how one is run over a chunk's rows."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from datamodules.curation.caption_filter import CaptionFilter, GivenCaptions
from datamodules.curation.chunks import Chunk, read_chunk
from datamodules.curation.config import Curation
from datamodules.curation.cutting import CutEntities
from datamodules.curation.entity_check import CheckEntities
from datamodules.curation.preparation import Prepare
from datamodules.curation.rows import Batch, Stage, alive, drop_for
from datamodules.curation.stage_config import Model, Pool
from datamodules.curation.toyland import ScoreMasks, ToylandAnswers, ToylandCaptions, ToylandHeat
from datamodules.errors import DataError

PLAIN_BATCH = 64
"""Rows at once of a stage that looks at them one by one."""
FATAL = (DataError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Faults of the machine or the configuration: no row is to blame, so none is dropped for them."""


@dataclass(frozen=True)
class Step:
    """A stage that is not built yet; can be sent to another process."""

    name: str
    build: Callable[[], Stage]
    batch_size: int = PLAIN_BATCH


@dataclass(frozen=True)
class Group:
    """Stages that one worker does after each other."""

    name: str
    steps: list[Step]
    pool: Pool


@dataclass
class Work:
    """A chunk under way."""

    chunk: Chunk
    rows: Batch
    timing: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Step → rows given to it, seconds."""


def groups(config: Curation) -> list[Group]:
    """All stages in their order. The first group reads the chunk before, the last writes it after."""
    caption, entities, masks = config.caption, config.entities, config.masks
    world = (config.toyland, config.seed)
    captioner: dict[str, Callable[[], Stage]] = {
        "blip2": partial(_blip2, caption, config.device),
        "given": GivenCaptions,
        "toyland": partial(ToylandCaptions, *world),
    }
    asker: dict[str, Callable[[], Stage]] = {
        "language_model": partial(_language_model, entities, config.device),
        "toyland": partial(ToylandAnswers, *world),
    }
    segmenter: dict[str, Callable[[], Stage]] = {
        "clipseg": partial(_clipseg, masks, config.device),
        "toyland": partial(ToylandHeat, *world),
    }
    scoring = [Step("score", partial(ScoreMasks, *world))] if masks.by == "toyland" else []
    listed = [
        Group("prepare", [Step("prepare", partial(Prepare, config.image, config.input.limits))], config.ray.prepare)
    ]

    def append(step: Step, model: Model, asked: bool, *following: Step) -> None:
        # Without a model there is nothing to hold: such a stage is done where the one before was.
        if asked:
            listed.append(Group(step.name, [step, *following], model.pool))
        else:
            listed[-1].steps.extend((step, *following))

    if config.safety.enabled:
        step = Step("safety", partial(_safety, config.safety, config.device), config.safety.batch_size)
        append(step, config.safety, True)
    filtering = Step("caption_filter", partial(CaptionFilter, config.text_filter))
    append(Step("caption", captioner[caption.by], caption.batch_size), caption, caption.by == "blip2", filtering)
    checking = Step("entity_check", partial(CheckEntities, entities))
    asks = entities.by == "language_model"
    append(Step("entities", asker[entities.by], entities.batch_size), entities, asks, checking)
    append(Step("masks", segmenter[masks.by], masks.batch_size), masks, masks.by == "clipseg")
    cutting = Step("cut", partial(CutEntities, config.crops, config.image))
    return [*listed, Group("write", [cutting, *scoring], config.ray.write)]


# Imported where they are built: a worker that holds no model needs neither transformers' memory nor its start.


def _safety(*arguments) -> Stage:
    from datamodules.curation.safety import SafetyFilter

    return SafetyFilter(*arguments)


def _blip2(*arguments) -> Stage:
    from datamodules.curation.captioning import Blip2Captions

    return Blip2Captions(*arguments)


def _language_model(*arguments) -> Stage:
    from datamodules.curation.entity_answers import AskLanguageModel

    return AskLanguageModel(*arguments)


def _clipseg(*arguments) -> Stage:
    from datamodules.curation.segmentation import ClipSegHeat

    return ClipSegHeat(*arguments)


def begin(chunk: Chunk, config: Curation) -> Work:
    """Read a chunk's images."""
    start = time.perf_counter()
    rows = read_chunk(chunk, config.input, given=config.caption.by == "given")
    return Work(chunk, rows, {"read": (len(rows), time.perf_counter() - start)})


class GroupWorker:
    """A group's stages, built; works on one chunk after the other."""

    def __init__(self, group: Group, seed: int):
        self.group, self.seed = group, seed
        self.stages = [step.build() for step in group.steps]

    def __call__(self, work: Work) -> Work:
        """The chunk after this group's stages."""
        # Sums of floats depend on the number of threads, and Ray would choose another than this process.
        torch.set_num_threads(self.group.pool.threads)
        torch.manual_seed(self.seed * 1_000_003 + work.chunk.number)
        for step, stage in zip(self.group.steps, self.stages, strict=True):
            work = run_step(step, stage, work)
        return work


def run_step(step: Step, stage: Stage, work: Work) -> Work:
    """One stage over a chunk's rows that are not dropped, in batches cut inside the chunk."""
    start = time.perf_counter()
    given = alive(work.rows)
    done = {}
    for first in range(0, len(given), step.batch_size):
        for row in attempt(step.name, stage, given[first : first + step.batch_size]):
            done[row["number"]] = row
    rows = [done.get(row["number"], row) for row in work.rows]
    timing = work.timing | {step.name: (len(given), time.perf_counter() - start)}
    return Work(work.chunk, rows, timing)


def attempt(name: str, stage: Stage, batch: Batch) -> Batch:
    """A batch through a stage; if that fails, each row alone, and those that fail again are dropped.

    Raises:
        DataError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError: see FATAL.
        RuntimeError: the stage lost rows, gave more, or changed their order.
    """
    try:
        result = stage(batch)
    except FATAL:
        raise
    except Exception as error:  # whatever a model, its processor or an image library raises at hostile data
        if len(batch) == 1:
            return [drop_for(batch[0], error, name)]
        return [row for single in batch for row in attempt(name, stage, [single])]
    if [row["number"] for row in result] != [row["number"] for row in batch]:
        raise RuntimeError(f"stage '{name}' must give back its rows in order; it got {len(batch)}, gave {len(result)}.")
    return result
