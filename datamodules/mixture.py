"""Global sample index → example: several sources as one map-style dataset without end."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from torch.utils.data import Dataset, Sampler

from datamodules.errors import DataError, SampleError
from datamodules.order import Draw, Mixture, mix
from datamodules.reader import SampleReader
from kosmosg.batches import MicroBatch, ReadReport

T = TypeVar("T")
MAX_ATTEMPTS = 100
MEASURED_ROWS = 128
# Turns of whole batches are drawn without replacement from blocks of this many times the weights: at 1:2:2 and 64
# ranks, a step's counts of each source then spread as independent draws do within 1 % (63 of 4,999 turns).
TURNS_PER_WEIGHT = 1000


@dataclass
class Request:
    """One row to build: row `row` of its source in `lane`, with random choices from `random` alone.

    `attempt`: how many samples were unusable for it so far.
    """

    lane: int
    row: int
    attempt: int
    seed: tuple[int, ...]

    @cached_property
    def random(self) -> random.Random:
        """Random numbers that depend on the run's seed and the position only."""
        return random.Random(mix(*self.seed))


class RowBuilder(ABC, Generic[T]):
    """Builds rows from one source.

    Attributes:
        name: of the source.
        samples_per_row: samples that a row takes; 0 until it is measured.
    """

    samples_per_row = 1.0

    def __init__(self, name: str, source: SampleReader):
        self.name, self.source = name, source

    @abstractmethod
    def __call__(self, requests: Sequence[Request], report: ReadReport) -> list[tuple[T, str] | SampleError]:
        """For each request, in order, a row with the `shard/key` it starts from, or the error that made it impossible.

        `report` takes the number of samples read and the errors that did not cost a row.
        """

    @abstractmethod
    def tokens(self, row: T) -> int:
        """Tokens of a row, padding left out."""

    def measure(self) -> float:
        """A value for `samples_per_row`, from the first samples."""
        return 1.0


class MixtureDataset(Dataset, Generic[T]):
    """Rows by global sample index. An unusable sample is replaced by the next usable one of its block, and counted.

    Args:
        builders: one for each source.
        order: which source each row is from.
        collate: rows and their report → micro-batch.
    """

    def __init__(
        self,
        builders: Sequence[RowBuilder[T]],
        order: Mixture,
        collate: Callable[[list[T], ReadReport], MicroBatch],
    ):
        self.builders, self.order, self.collate = list(builders), order, collate

    def __getitem__(self, positions: Sequence[int]):
        """The batch of these global sample indices.

        Raises:
            DataError: too many samples in a row of a source are unusable.
        """
        draws = {position: self.order(position) for position in positions}
        rows, report = self._rows(draws)
        for position in positions:
            report.samples.append(rows[position][1])
            report.sources.append(self.builders[draws[position].source].name)
        batch = self.collate([rows[position][0] for position in positions], report)
        batch.indices = list(positions)
        return batch

    def tokens_per_row(self, source: int) -> float:
        """Mean tokens of the first rows of a source, padding left out."""
        rows, _ = self._rows({row: Draw(source, 0, row) for row in range(MEASURED_ROWS)})
        return sum(self.builders[source].tokens(row) for row, _ in rows.values()) / len(rows)

    def _rows(self, draws: dict[int, Draw]) -> tuple[dict[int, tuple[T, str]], ReadReport]:
        rows: dict[int, tuple[T, str]] = {}
        report = ReadReport()
        for attempt in range(MAX_ATTEMPTS):
            pending = [position for position in draws if position not in rows]
            if not pending:
                return rows, report
            for number, builder in enumerate(self.builders):
                chosen = [position for position in pending if draws[position].source == number]
                if not chosen:
                    continue
                requests = [
                    Request(draws[one].lane, draws[one].row, attempt, (self.order.seed, 3, one, attempt))
                    for one in chosen
                ]
                for position, row in zip(chosen, builder(requests, report), strict=True):
                    if isinstance(row, SampleError):
                        report.errors.append(row)
                    else:
                        rows[position] = row
        raise DataError(
            f"{MAX_ATTEMPTS} samples in a row are unusable, the last: {report.errors[-1]}. Look at the filters and "
            "at the shards."
        )


class BatchPositions(Sampler[list[int]]):
    """Which global sample indices each micro-batch of this rank reads.

    Micro-batch `k` of all ranks together reads the positions after those of micro-batch `k - 1` without a gap, and
    rank `rank` of `world_size` its contiguous part, so that every rank has equally many.

    Args:
        size: rows of a micro-batch.
        count: micro-batches of the whole run.
        first: gives the number of the micro-batch to begin with; asked at every iteration.
    """

    def __init__(self, size: int, count: int, rank: int, world_size: int, first: Callable[[], int]):
        self.size, self.count, self.rank, self.world_size, self.first = size, count, rank, world_size, first

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.first(), self.count):
            start = (number * self.world_size + self.rank) * self.size
            yield list(range(start, start + self.size))
