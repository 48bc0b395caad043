"""All processes of a run stop together: one that raises alone would leave the others waiting for it for ever.

Before a batch is used, the processes add up what they read and what failed, on the CPU. An error in the data of one
becomes an error of all, and the counts are those of the whole run, the same on every process.
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
class Answered:
    """What a dataset answered: a batch, or why there is none."""

    batch: Any = None
    error: str | None = None

    def pin_memory(self) -> "Answered":
        """With the batch in page-locked memory: the DataLoader pins only what says how."""
        return self if self.batch is None else Answered(self.batch.pin_memory())


class AnsweringDataset(Dataset):
    """Answers with the error instead of raising it, so that it reaches the training process as it is."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, positions: Any) -> Answered:
        """The batch of these positions, or the DataError that there was."""
        try:
            return Answered(self.dataset[positions])
        except DataError as error:
            return Answered(error=str(error))


class Agreement:
    """Counts every batch's report together with those of the other processes.

    Args:
        counter: is given the reports of all processes.
    """

    def __init__(self, counter: SampleCounter):
        self.counter = counter
        self._group: Any = None

    def __call__(self, answer: Answered) -> Any:
        """The batch. Every process must call this equally often.

        Raises:
            DataError: a process has no batch, or too large a share of all processes' reads is unusable.
        """
        report = answer.batch.report if answer.error is None else ReadReport()
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            if answer.error is not None:
                raise DataError(answer.error)
            self.counter.add(report)
            return answer.batch
        sums = torch.tensor([report.reads, len(report.errors), answer.error is not None])
        distributed.all_reduce(sums, group=self._processes())
        reads, errors, stopped = sums.tolist()
        found = self._gather((report.errors, answer.error)) if errors or stopped else []
        for rank, (_, error) in enumerate(found):
            if error is not None:
                raise DataError(f"process {rank}: {error}")
        self.counter.add(ReadReport(reads=reads, errors=[error for errors, _ in found for error in errors]))
        return answer.batch

    def _processes(self) -> Any:
        """A group on the CPU: counting must not wait for the GPU's queue."""
        if self._group is None:
            gloo = distributed.get_backend() == "gloo"
            self._group = distributed.group.WORLD if gloo else distributed.new_group(backend="gloo")
        return self._group

    def _gather(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, mine, group=self._processes())
        return found
