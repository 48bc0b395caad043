"""A mixture of sources as one endless map-style dataset: global sample index → row."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from torch.utils.data import Dataset, Sampler

from datamodules.errors import DataError, SampleError
from datamodules.order import Draw, Mixture, mix
from datamodules.reader import SampleReader
from kosmosg.batches import MicroBatch, ReadReport

T = TypeVar("T")
MAX_ATTEMPTS = 100
MEASURED_ROWS = 128
# With mixing=per_batch, sources are drawn without replacement from blocks of this many times the weights. At 1:2:2 and
# 64 ranks, the counts per step then vary like those of independent draws to within 1 % (63 of 4,999 draws).
DRAWS_PER_WEIGHT = 1000


@dataclass
class Request:
    """One row to build: row `row` of its source in `lane`. All random choices come from `random`.

    `attempt` is the number of samples that were already tried for this row and were unusable.
    """

    lane: int
    row: int
    attempt: int
    seed: tuple[int, ...]

    @cached_property
    def random(self) -> random.Random:
        """Random numbers that depend only on the seed, the position and the attempt."""
        return random.Random(mix(*self.seed))


class RowBuilder(ABC, Generic[T]):
    """Builds rows from one source.

    Attributes:
        name: name of the source.
        samples_per_row: mean number of samples in a row; 0 until it is measured.
    """

    samples_per_row = 1.0

    def __init__(self, name: str, source: SampleReader):
        self.name, self.source = name, source

    @abstractmethod
    def __call__(self, requests: Sequence[Request], report: ReadReport) -> list[tuple[T, str] | SampleError]:
        """Return, for each request, a row and the `shard/key` it starts with, or the error that prevented it.

        Adds the number of samples read, and errors that did not prevent a row, to `report`.
        """

    def tokens(self, row: Any) -> int:
        """Return the number of tokens of a row, without padding: by default, the length of the row's first item."""
        return len(row[0])

    def measure(self) -> float:
        """Measure `samples_per_row` on the first samples."""
        return 1.0


class MixtureDataset(Dataset, Generic[T]):
    """Micro-batches by global sample indices. An unusable sample is counted and replaced by the next of its block.

    Args:
        builders: one per source.
        order: determines the source of each row.
        collate: makes a micro-batch of rows and their report.
    """

    def __init__(
        self,
        builders: Sequence[RowBuilder[T]],
        order: Mixture,
        collate: Callable[[list[T], ReadReport], MicroBatch],
    ):
        self.builders, self.order, self.collate = list(builders), order, collate

    def __getitem__(self, positions: Sequence[int]):
        """Return the micro-batch of these global sample indices.

        Raises:
            DataError: `MAX_ATTEMPTS` consecutive samples of a source are unusable.
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
        """Mean number of tokens, without padding, of the first rows of a source."""
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
            f"{MAX_ATTEMPTS} samples in a row are unusable, the last: {report.errors[-1]}. Check the filters and the "
            "shards."
        )


class BatchPositions(Sampler[list[int]]):
    """Yields the global sample indices of each micro-batch of this rank.

    Micro-batch `k` of all ranks together reads the positions directly after those of micro-batch `k - 1`; each rank
    reads an equal, contiguous part of them.

    Args:
        size: rows per micro-batch.
        count: micro-batches of the whole run.
        first: returns the number of the first micro-batch; called at the start of every iteration.
    """

    def __init__(self, size: int, count: int, rank: int, world_size: int, first: Callable[[], int]):
        self.size, self.count, self.rank, self.world_size, self.first = size, count, rank, world_size, first

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.first(), self.count):
            start = (number * self.world_size + self.rank) * self.size
            yield list(range(start, start + self.size))
