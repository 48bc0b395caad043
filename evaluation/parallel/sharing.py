"""What networks say of many files, computed in shares by all processes of a launch.

All processes score the same rows, and ask for the same features in the same order. Batches are cut by position alone
and go to whoever is free, so that features, and with them every score, are bit for bit those of one process.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from evaluation.parallel.processes import Processes
from evaluation.parallel.progress import progress

Encode = Callable[[list], Any]
"""A batch of N items → N×F, or N answers."""


class Sharing:
    """Work shared over `processes`.

    Args:
        batch_size: items that are encoded at once.
    """

    def __init__(self, processes: Processes, batch_size: int, console: Console):
        self.processes, self.batch_size, self.console = processes, batch_size, console

    def compute(self, name: str, encode: Encode, items: Sequence) -> list:
        """What `encode` gives for each of N items, in all processes."""
        batches = [list(items[start : start + self.batch_size]) for start in range(0, len(items), self.batch_size)]
        if len(batches) == 1:
            return list(encode(batches[0]))
        taken, done = self.processes.counter(), self.processes.counter()
        found: dict[int, Any] = {}
        with progress(name, len(items), 0, self.console, passing=True) as show:
            while (number := taken.take()) < len(batches):
                found[number] = encode(batches[number])
                show(done.add(len(batches[number])))
        for others in self.processes.gather(found):
            found |= others
        return [row for number in range(len(batches)) for row in found[number]]


class Remembered:
    """What a network says of files or texts, computed once for each however often it is asked for.

    Args:
        name: shown with the progress.
        encode: a list of items → N×F, or N answers.
        read: applied to an item before it is encoded.
    """

    def __init__(self, name: str, encode: Encode, sharing: Sharing, read: Callable[[Any], Any] = lambda item: item):
        self.name, self.encode, self.sharing, self.read = name, encode, sharing, read
        self.known: dict[Any, Any] = {}

    def answers(self, items: Sequence) -> list:
        """N items → N answers, in their order."""
        if new := [item for item in dict.fromkeys(items) if item not in self.known]:
            self.known.update(zip(new, self.sharing.compute(self.name, self._batch, new), strict=True))
        return [self.known[item] for item in items]

    def __call__(self, items: Sequence) -> Tensor:
        """N items → N×F, in their order."""
        return torch.stack(self.answers(items))

    def _batch(self, items: Sequence) -> Any:
        return self.encode([self.read(item) for item in items])
