"""Stop all ranks together on a data error, since one rank that raised alone would deadlock the others.

Before a micro-batch is used, the ranks sum their numbers of reads and failures on the CPU. A data error on one rank
becomes an error on all, and every rank has the counts of the whole run.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.report import SampleCounter
from kosmosg.batches import ReadReport


@dataclass
class FetchResult:
    """A batch, or the message of the DataError raised in its place."""

    batch: Any = None
    error: str | None = None

    def pin_memory(self) -> "FetchResult":
        """Pin the batch. The DataLoader pins objects of unknown types only through this method."""
        return self if self.batch is None else FetchResult(self.batch.pin_memory())


class CatchDataErrors(Dataset):
    """Returns a DataError instead of raising it, so that it reaches the training process unchanged."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, positions: Any) -> FetchResult:
        """Return the batch of these positions, or the error that occurred."""
        try:
            return FetchResult(self.dataset[positions])
        except DataError as error:
            return FetchResult(error=str(error))


class Agreement:
    """Counts the reports of every micro-batch over all ranks.

    Args:
        counter: receives the reports of all ranks.
    """

    def __init__(self, counter: SampleCounter):
        self.counter = counter
        self._group: Any = None

    def __call__(self, result: FetchResult) -> Any:
        """Return the batch of `result`. All ranks must call this the same number of times.

        Raises:
            DataError: a rank has no batch, or too large a share of the samples of all ranks is unusable.
        """
        report = result.batch.report if result.error is None else ReadReport()
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            if result.error is not None:
                raise DataError(result.error)
            self.counter.add(report)
            return result.batch
        sums = torch.tensor([report.reads, len(report.errors), result.error is not None])
        distributed.all_reduce(sums, group=self._cpu_group())
        reads, errors, stopped = sums.tolist()
        gathered = self._gather((report.errors, result.error)) if errors or stopped else []
        for rank, (_, error) in enumerate(gathered):
            if error is not None:
                raise DataError(f"rank {rank}: {error}")
        self.counter.add(ReadReport(reads=reads, errors=[error for errors, _ in gathered for error in errors]))
        return result.batch

    def _cpu_group(self) -> Any:
        """A gloo group, so that counting does not wait for the GPU."""
        if self._group is None:
            gloo = distributed.get_backend() == "gloo"
            self._group = distributed.group.WORLD if gloo else distributed.new_group(backend="gloo")
        return self._group

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, value, group=self._cpu_group())
        return gathered
