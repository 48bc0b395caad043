"""All ranks of a run stop together: one that raised alone would deadlock the others.

Before a micro-batch is used, the ranks sum what they read and what failed, on the CPU. A data error of one rank becomes
an error of all, and the counts are those of the whole run, the same on every rank.
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
    """Counts the report of every micro-batch together with those of the other ranks.

    Args:
        counter: is given the reports of all ranks.
    """

    def __init__(self, counter: SampleCounter):
        self.counter = counter
        self._group: Any = None

    def __call__(self, answer: Answered) -> Any:
        """The batch. All ranks must call this equally often.

        Raises:
            DataError: a rank has no batch, or too large a share of all ranks' reads is unusable.
        """
        report = answer.batch.report if answer.error is None else ReadReport()
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            if answer.error is not None:
                raise DataError(answer.error)
            self.counter.add(report)
            return answer.batch
        sums = torch.tensor([report.reads, len(report.errors), answer.error is not None])
        distributed.all_reduce(sums, group=self._cpu_group())
        reads, errors, stopped = sums.tolist()
        found = self._gather((report.errors, answer.error)) if errors or stopped else []
        for rank, (_, error) in enumerate(found):
            if error is not None:
                raise DataError(f"rank {rank}: {error}")
        self.counter.add(ReadReport(reads=reads, errors=[error for errors, _ in found for error in errors]))
        return answer.batch

    def _cpu_group(self) -> Any:
        """A group on the CPU: counting must not wait for the GPU's queue."""
        if self._group is None:
            gloo = distributed.get_backend() == "gloo"
            self._group = distributed.group.WORLD if gloo else distributed.new_group(backend="gloo")
        return self._group

    def _gather(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, mine, group=self._cpu_group())
        return found
