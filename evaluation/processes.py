"""The processes of one launch, over torch.distributed (gloo), and work that they share.

They meet only to exchange results, and work goes to whoever is free, by a counter in torchrun's store. A process that
fails tells the others why; one that dies closes its connections, and the others end with an error that names it.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from textwrap import shorten
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed import DistError, HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from evaluation.protocols.benchmark import EvaluationError

Value = TypeVar("Value")
Encode = Callable[[list], Any]
"""A batch of N items → N×F, or N answers."""
ANSWER = timedelta(minutes=5)
"""Within which the launch's store answers."""
LONGEST_WAIT = timedelta(days=7)
"""For a process that works; one that dies is noticed at once."""
LAST_WORDS_SECONDS = 2.0
"""Within which a process that fails has told why."""
LINE_EVERY_SECONDS = 60.0
"""Of progress in a file or pipe."""


class ProcessError(EvaluationError):
    """Another process of the launch failed or died; says which."""


class Processes:
    """This process among `count`; every one of them makes the same calls in the same order.

    Args:
        rank: of this process, 0 … count - 1. The first one decides, aggregates and shows.
        local_rank: among the processes of its machine: the number of its GPU.
        store: what all of them share.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, store: Store | None = None):
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._store = PrefixStore("kosmosg-evaluation", store or HashStore())
        self._calls = 0

    @classmethod
    def of_environment(cls) -> "Processes":
        """As torchrun's variables say (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); else one process."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        store, rank, count = next(rendezvous("env://", timeout=ANSWER))
        return cls(rank, count, int(os.environ.get("LOCAL_RANK", "0")), store)

    @property
    def first(self) -> bool:
        """Whether this is the one that decides, aggregates and shows."""
        return self.rank == 0

    def __enter__(self) -> "Processes":
        if self.count > 1:
            self._store.set(f"host/{self.rank}", socket.gethostname())
            options = {"store": self._store, "rank": self.rank, "world_size": self.count, "timeout": LONGEST_WAIT}
            # One that fails right after it connected keeps others from connecting to each other.
            self._together(lambda: dist.init_process_group("gloo", **options))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave together; after an exception, tell the others why."""
        if self.count == 1:
            return
        try:
            if error is None:
                self.wait()  # the first one's store outlives everyone's last question
            elif not isinstance(error, ProcessError):
                self._store.set(f"failed/{self.rank}", f"{kind.__name__ if kind else 'error'}: {error}")
        except (DistError, ProcessError):
            if error is None:
                raise
        finally:
            dist.destroy_process_group()
            if self.first and error is not None:
                time.sleep(LAST_WORDS_SECONDS)  # where it hosts the store, the others read there what has happened

    def share(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, in all of them."""
        values = [make() if self.first else None]
        self._together(lambda: dist.broadcast_object_list(values, src=0))
        return values[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        """Everyone's value, by rank, in all of them."""
        values: list[Any] = [value] * self.count
        self._together(lambda: dist.all_gather_object(values, value))
        return values

    def wait(self) -> None:
        """Until all processes are here, however long it takes.

        Raises:
            ProcessError: one of them failed or died.
        """
        self._together(dist.barrier)

    def counter(self) -> Callable[[int], int]:
        """A function that adds to a number which all processes share, zero at first, and gives the sum."""
        self._calls += 1
        key = f"counter/{self._calls}"

        def add(amount: int) -> int:
            try:
                return self._store.add(key, amount)
            except DistError as error:
                raise self._explained(error) from error

        return add

    def take(self, count: int) -> Iterator[int]:
        """The numbers below `count`, each to one process: to whichever is free."""
        add = self.counter()
        while (number := add(1) - 1) < count:
            yield number

    def _together(self, exchange: Callable[[], Any]) -> None:
        if self.count == 1:
            return
        self._calls += 1
        try:
            self._store.set(f"at/{self.rank}", str(self._calls))
            exchange()
        except (DistError, RuntimeError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> ProcessError:
        """Which process failed, as it told; else those that had not come to this exchange."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        try:
            until = time.monotonic() + LAST_WORDS_SECONDS
            while time.monotonic() < until:
                for rank in others:
                    if told := self._known(f"failed/{rank}"):
                        return ProcessError(f"{self._named(rank)} failed: {told}")
                time.sleep(0.1)
            late = [rank for rank in others if int(self._known(f"at/{rank}") or 0) < self._calls] or others
        except DistError:
            late = [0]
        return ProcessError(
            f"{' or '.join(map(self._named, late))} died ({shorten(str(error), 160)}); start the same command again, "
            "and it goes on from here."
        )

    def _known(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _named(self, rank: int) -> str:
        try:
            host = self._known(f"host/{rank}") or "unknown host"
        except DistError:
            host = "its node cannot be reached"
        return f"process {rank} of {self.count} ({host})"


@contextmanager
def progress(
    label: str, total: int, there: int, console: Console, *, passing: bool = False
) -> Iterator[Callable[[int], None]]:
    """A function to tell how many more than `there` of `total` are done by now: a bar with the time left on a terminal,
    a line now and then elsewhere. `passing` leaves nothing behind."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Images come in bursts, minutes apart: the time left follows from all that was made since the start.
    whole = {"speed_estimate_period": float("inf"), "transient": passing, "disable": not console.is_terminal}
    bar = Progress(*columns, TimeRemainingColumn(), console=console, **whole)
    number, told = bar.add_task(label, total=total, completed=there), time.monotonic()
    (task,) = bar.tasks

    def line() -> None:
        left = "?" if task.time_remaining is None else timedelta(seconds=round(task.time_remaining))
        console.print(f"{label} {task.completed:.0f}/{total}  {left} left", highlight=False, soft_wrap=True)

    def update(made: int) -> None:
        nonlocal told
        bar.update(number, completed=there + made)
        if not console.is_terminal and time.monotonic() - told >= LINE_EVERY_SECONDS:
            told = time.monotonic()
            line()

    with bar:
        try:
            yield update
        finally:
            if not (console.is_terminal or passing):
                line()


@dataclass(frozen=True)
class Sharing:
    """How networks look at many items: all processes together, `batch_size` items at once."""

    processes: Processes
    batch_size: int
    console: Console


class Remembered:
    """What a network says of files or texts, computed once for each however often it is asked for.

    All processes ask for the same in the same order. Batches are cut by position alone and go to whoever is free, so
    that features, and with them every score, are bit for bit those of one process.

    Args:
        name: shown with the progress.
        encode: a list of items → N×F, or N answers.
        read: applied to an item before it is encoded.
    """

    def __init__(self, name: str, encode: Encode, sharing: Sharing, read: Callable[[Any], Any] = lambda item: item):
        self.name, self.encode, self.sharing, self.read = name, encode, sharing, read
        self.known: dict[Any, Any] = {}

    def __call__(self, items: Sequence) -> Tensor:
        """N items → N×F, in their order."""
        return torch.stack(self.answers(items))

    def answers(self, items: Sequence) -> list:
        """N items → N answers, in their order."""
        if new := [item for item in dict.fromkeys(items) if item not in self.known]:
            self.known.update(zip(new, self._compute(new), strict=True))
        return [self.known[item] for item in items]

    def _compute(self, items: Sequence) -> list:
        processes, size = self.sharing.processes, self.sharing.batch_size
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        if len(batches) == 1:  # not worth a meeting
            return list(self._encode(batches[0]))
        done, found = processes.counter(), {}
        with progress(self.name, len(items), 0, self.sharing.console, passing=True) as show:
            for number in processes.take(len(batches)):
                found[number] = self._encode(batches[number])
                show(done(len(batches[number])))
        for others in processes.gather(found):
            found |= others
        return [row for number in range(len(batches)) for row in found[number]]

    def _encode(self, items: Sequence) -> Any:
        return self.encode([self.read(item) for item in items])
