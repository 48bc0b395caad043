"""Global sample index → example: several sources as one map-style dataset without end or memory."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

from torch.utils.data import Dataset, Sampler

from datamodules.errors import DataError, SampleError
from datamodules.images import Limits
from datamodules.order import Draw, MixtureOrder, mix, whole_weights
from datamodules.sample import CaptionSample, Sample, decode
from datamodules.storage.indexed_shards import IndexedShards
from datamodules.storage.remote import RemoteConfig
from kosmosg.batches import MicroBatch, ReadReport

T = TypeVar("T")
MAX_ATTEMPTS = 100
MEASURED_ROWS = 128
# Turns of whole batches are drawn without replacement from blocks of this many times the weights: at 1:2:2 and 64
# ranks, a step's counts of each source then spread as independent draws do within 1 % (63 of 4,999 turns).
TURNS_PER_WEIGHT = 1000


class SampleSource:
    """The decoded samples of one kind in some shards.

    Args:
        suffixes: tar members to read; None reads all.
        remote: object stores that the pattern may name.
    """

    def __init__(
        self,
        pattern: str,
        kind: str,
        limits: Limits,
        suffixes: frozenset[str] | None = None,
        remote: RemoteConfig | None = None,
    ):
        self.shards = IndexedShards(pattern, limits, remote)
        self.kind, self.limits, self.suffixes = kind, limits, suffixes

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> Sample:
        """Sample `i`, images still encoded. Raises SampleError: it cannot be used."""
        shard, key, members = self.shards.read(i, self.suffixes)
        return decode(members, shard, key, kind=self.kind, limits=self.limits)

    def caption(self, i: int) -> Sample:
        """Sample `i` without its image, where that is quicker. Raises SampleError: it cannot be used."""
        text = self.shards.text(i)
        if text is None:
            return self[i]
        shard, key, content = text
        try:
            caption = content.decode("utf-8").strip()
        except UnicodeDecodeError:
            caption = ""
        # What is not plainly a caption is left to `decode`, which names what is wrong.
        return CaptionSample(caption, None, key, shard) if caption else decode({"txt": content}, shard, key)


@dataclass
class Request:
    """One row to build: element `index` of the source, with random choices from `random` alone."""

    index: int
    epoch: int
    seed: tuple[int, ...]

    @cached_property
    def random(self) -> random.Random:
        """Random numbers that depend on the run's seed and the position only."""
        return random.Random(mix(*self.seed))


class RowBuilder(Protocol[T]):
    """Builds rows from one source; for each request a row, or the error that made it impossible.

    `report` takes the number of samples read and the errors that did not cost the row.
    """

    name: str
    source: SampleSource

    def __call__(self, requests: Sequence[Request], report: ReadReport) -> list[tuple[T, str] | SampleError]:
        """Rows with the `shard/key` they start from, in the order of the requests."""
        ...

    def tokens(self, row: T) -> int:
        """Tokens of a row, padding left out."""
        ...


class MixtureDataset(Dataset, Generic[T]):
    """Rows by global sample index. An unusable sample is replaced by another of its source, chosen by the order.

    Args:
        builders: one for each source.
        weights: whole shares of the sources.
        collate: rows and their report → micro-batch.
        rows_per_turn: rows in a row from one source, see `MixtureOrder`.
    """

    def __init__(
        self,
        builders: Sequence[RowBuilder[T]],
        weights: Sequence[int],
        seed: int,
        collate: Callable[[list[T], ReadReport], MicroBatch],
        rows_per_turn: int = 1,
    ):
        self.builders, self.collate, self.seed = list(builders), collate, seed
        repeats = 1 if rows_per_turn == 1 else TURNS_PER_WEIGHT
        self.order = MixtureOrder(seed, [len(builder.source) for builder in builders], weights, rows_per_turn, repeats)

    def __getitem__(self, positions: Sequence[int]):
        """The batch of these global sample indices.

        Raises:
            DataError: too many samples in a row of a source are unusable.
        """
        rows, report, draws = self._rows(positions)
        for position in positions:
            report.samples.append(rows[position][1])
            report.sources.append(self.builders[draws[position].source].name)
        batch = self.collate([rows[position][0] for position in positions], report)
        batch.indices = list(positions)
        return batch

    def mean_tokens(self, rows_each: int) -> list[float]:
        """Mean tokens of the first `rows_each` rows of each source."""
        means = []
        for builder in self.builders:
            alone = MixtureDataset([builder], [1], self.seed, self.collate)
            rows = alone._rows(range(rows_each))[0].values()
            means.append(sum(builder.tokens(row) for row, _ in rows) / rows_each)
        return means

    def _rows(self, positions: Sequence[int]) -> tuple[dict[int, tuple[T, str]], ReadReport, dict[int, Draw]]:
        draws = {position: self.order(position) for position in positions}
        rows: dict[int, tuple[T, str]] = {}
        report = ReadReport()
        for attempt in range(MAX_ATTEMPTS):
            pending = [position for position in draws if position not in rows]
            if not pending:
                break
            for number, builder in enumerate(self.builders):
                chosen = [position for position in pending if draws[position].source == number]
                if not chosen:
                    continue
                requests = [self._request(position, draws[position], attempt) for position in chosen]
                builder.source.shards.prefetch([request.index for request in requests])
                for position, row in zip(chosen, builder(requests, report), strict=True):
                    if isinstance(row, SampleError):
                        report.errors.append(row)
                    else:
                        rows[position] = row
        else:
            raise DataError(
                f"{MAX_ATTEMPTS} samples in a row are unusable, the last: {report.errors[-1]}. Look at the filters and "
                "at the shards."
            )
        return rows, report, draws

    def _request(self, position: int, draw: Draw, attempt: int) -> Request:
        index = self.order.redraw(draw, attempt) if attempt else draw.index
        return Request(index, draw.epoch, (self.seed, 3, position, attempt))


def token_weights(dataset: MixtureDataset, shares: Sequence[int]) -> list[int]:
    """Whole weights of rows with which the sources' tokens come in these shares.

    Every process measures the same rows, so all agree; a resumed run measures them again.
    """
    means = dataset.mean_tokens(MEASURED_ROWS)
    return whole_weights([share / max(mean, 1.0) for share, mean in zip(shares, means, strict=True)])


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
