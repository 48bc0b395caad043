"""Features of many files, computed in shares by all processes of a launch.

The first process scores, and asks for features as if it were alone. The others serve: for each long list that it asks
for, all take batches until none is left. Batches are cut by position alone, so that features, and with them every
score, are bit for bit those of one process. They come back through the output folder, which all processes share.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.parallel.processes import Counter, Processes
from evaluation.parallel.progress import progress

Encode = Callable[[Sequence], Tensor]
"""A batch of N items → N×F."""


class Sharing:
    """Work shared over `processes`; `folder` is used in passing, and removed.

    Args:
        batch_size: items that are encoded at once.
    """

    def __init__(self, processes: Processes, folder: Path, batch_size: int, console: Console):
        self.processes, self.folder, self.batch_size, self.console = processes, folder, batch_size, console

    def compute(self, name: str, encode: Encode, items: Sequence) -> Tensor:
        """N items → N×F, in the first process.

        Args:
            name: under which the others have the same encoder.
        """
        batches = cut(items, self.batch_size)
        if len(batches) == 1:
            return encode(batches[0])
        if self.processes.count > 1:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        self.processes.share(lambda: {"encoder": name, "items": [str(item) for item in items]})
        taken, done = self.processes.counter(), self.processes.counter()
        with progress(name, len(items), 0, lambda: min(len(items), done.value), self.console, passing=True):
            found = take_batches(encode, batches, taken, done)
            self.processes.wait()
        for rank in range(1, self.processes.count):
            found |= {int(number): rows for number, rows in load_file(self._file(rank)).items()}
        shutil.rmtree(self.folder, ignore_errors=True)
        return torch.cat([found[number] for number in range(len(batches))])

    def serve(self, encoders: Mapping[str, Encode]) -> None:
        """In the other processes: compute shares until the first one has no more to ask."""
        while (asked := self.processes.share(dict)) != {}:
            taken, done = self.processes.counter(), self.processes.counter()
            batches = cut(asked["items"], self.batch_size)
            found = take_batches(encoders[asked["encoder"]], batches, taken, done)
            save_file(
                {str(number): rows.contiguous() for number, rows in found.items()}, self._file(self.processes.rank)
            )
            self.processes.wait()

    def dismiss(self) -> None:
        """In the first process: there is no more to ask."""
        self.processes.share(dict)

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.safetensors"


def cut(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def take_batches(encode: Encode, batches: Sequence[Sequence], taken: Counter, done: Counter) -> dict[int, Tensor]:
    """What this process gets to encode, by the number of the batch."""
    found: dict[int, Tensor] = {}
    while (number := taken.take()) < len(batches):
        found[number] = encode(batches[number])
        done.add(len(batches[number]))
    return found
