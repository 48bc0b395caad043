"""Coordinate the ranks of an evaluation over torch.distributed (gloo).

Ranks synchronize only to exchange results. Work is distributed dynamically through a counter in torchrun's store. A
rank that fails publishes its error; if a rank dies, its connections close and the other ranks name it in an error.
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
STORE_TIMEOUT = timedelta(minutes=5)
COLLECTIVE_TIMEOUT = timedelta(days=7)
"""Ranks may work for a long time between collectives; a dead rank is detected at once."""
ERROR_SECONDS = 2.0
"""Time for a failing rank to publish its error."""
LINE_EVERY_SECONDS = 60.0
"""Interval of progress lines in a file or pipe."""


class ProcessError(EvaluationError):
    """Another rank failed or died; the message says which."""


class Processes:
    """The ranks of a launch, seen from this one. All ranks make the same calls in the same order.

    Args:
        rank: rank of this process, 0 … count - 1. Rank 0 decides, aggregates and prints.
        count: world size.
        local_rank: rank on this node, which selects the GPU.
        store: key-value store shared by all ranks.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, store: Store | None = None):
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._store = PrefixStore("kosmosg-evaluation", store or HashStore())
        self._calls = 0

    @classmethod
    def from_environment(cls) -> "Processes":
        """Read torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); default one rank."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        store, rank, count = next(rendezvous("env://", timeout=STORE_TIMEOUT))
        return cls(rank, count, int(os.environ.get("LOCAL_RANK", "0")), store)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def __enter__(self) -> "Processes":
        if self.count > 1:
            self._store.set(f"host/{self.rank}", socket.gethostname())
            options = {"store": self._store, "rank": self.rank, "world_size": self.count, "timeout": COLLECTIVE_TIMEOUT}
            # A rank that fails right after it connected keeps the others from connecting to each other.
            self._collective(lambda: dist.init_process_group("gloo", **options))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave together; after an exception, publish it to the other ranks."""
        if self.count == 1:
            return
        try:
            if error is None:
                self.barrier()  # rank 0 hosts the store and must outlive the last query
            elif not isinstance(error, ProcessError):
                self._store.set(f"failed/{self.rank}", f"{kind.__name__ if kind else 'error'}: {error}")
        except (DistError, ProcessError):
            if error is None:
                raise
        finally:
            dist.destroy_process_group()
            if self.first and error is not None:
                time.sleep(ERROR_SECONDS)  # rank 0 may host the store, where the others read the error

    def broadcast(self, make: Callable[[], Value]) -> Value:
        """Call `make` on rank 0 and return its value on all ranks."""
        values = [make() if self.first else None]
        self._collective(lambda: dist.broadcast_object_list(values, src=0))
        return values[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, ordered by rank, on all ranks."""
        values: list[Any] = [value] * self.count
        self._collective(lambda: dist.all_gather_object(values, value))
        return values

    def barrier(self) -> None:
        """Wait for all ranks, however long it takes.

        Raises:
            ProcessError: a rank failed or died.
        """
        self._collective(dist.barrier)

    def counter(self) -> Callable[[int], int]:
        """Return a function that adds to a counter shared by all ranks, initially zero, and returns the sum."""
        self._calls += 1
        key = f"counter/{self._calls}"

        def add(amount: int) -> int:
            try:
                return self._store.add(key, amount)
            except DistError as error:
                raise self._process_error(error) from error

        return add

    def distribute(self, count: int) -> Iterator[int]:
        """Yield the numbers below `count`, each on one rank, whichever is free first."""
        add = self.counter()
        while (number := add(1) - 1) < count:
            yield number

    def _collective(self, call: Callable[[], Any]) -> None:
        if self.count == 1:
            return
        self._calls += 1
        try:
            self._store.set(f"at/{self.rank}", str(self._calls))
            call()
        except (DistError, RuntimeError) as error:
            raise self._process_error(error) from error

    def _process_error(self, error: Exception) -> ProcessError:
        """Name the rank that published an error, or else the ranks that did not reach this call."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        try:
            until = time.monotonic() + ERROR_SECONDS
            while time.monotonic() < until:
                for rank in others:
                    if message := self._get(f"failed/{rank}"):
                        return ProcessError(f"{self._describe(rank)} failed: {message}")
                time.sleep(0.1)
            dead = [rank for rank in others if int(self._get(f"at/{rank}") or 0) < self._calls] or others
        except DistError:
            dead = [0]
        return ProcessError(
            f"{' or '.join(map(self._describe, dead))} died ({shorten(str(error), 160)}); start the same command again "
            "to continue."
        )

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _describe(self, rank: int) -> str:
        try:
            host = self._get(f"host/{rank}") or "unknown host"
        except DistError:
            host = "unreachable node"
        return f"process {rank} of {self.count} ({host})"


@contextmanager
def progress(
    label: str, total: int, done: int, console: Console, *, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show progress: a bar on a terminal, a line per minute elsewhere.

    Args:
        done: number finished before the start.
        transient: remove the bar at the end and print no final line.

    Yields:
        A function to call with the number finished since the start.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Images arrive in bursts minutes apart, so the time left is estimated from everything since the start.
    options = {"speed_estimate_period": float("inf"), "transient": transient, "disable": not console.is_terminal}
    bar = Progress(*columns, TimeRemainingColumn(), console=console, **options)
    number, last_line = bar.add_task(label, total=total, completed=done), time.monotonic()
    (task,) = bar.tasks

    def line() -> None:
        left = "?" if task.time_remaining is None else timedelta(seconds=round(task.time_remaining))
        console.print(f"{label} {task.completed:.0f}/{total}  {left} left", highlight=False, soft_wrap=True)

    def update(count: int) -> None:
        nonlocal last_line
        bar.update(number, completed=done + count)
        if not console.is_terminal and time.monotonic() - last_line >= LINE_EVERY_SECONDS:
            last_line = time.monotonic()
            line()

    with bar:
        try:
            yield update
        finally:
            if not (console.is_terminal or transient):
                line()


@dataclass(frozen=True)
class Batching:
    """How networks process many items: on all ranks, in batches of `batch_size`."""

    processes: Processes
    batch_size: int
    console: Console


class Cached:
    """A network whose outputs for files or texts are computed once and cached.

    All ranks pass the same items in the same order. Batches depend on position alone and each is computed by one rank,
    so that features and scores are bitwise equal to those of a single process.

    Args:
        name: shown with the progress.
        encode: a list of items → N×F, or N answers.
        read: applied to an item before it is encoded.
    """

    def __init__(self, name: str, encode: Encode, batching: Batching, read: Callable[[Any], Any] = lambda item: item):
        self.name, self.encode, self.batching, self.read = name, encode, batching, read
        self.cache: dict[Any, Any] = {}

    def __call__(self, items: Sequence) -> Tensor:
        """N items → N×F, in their order."""
        return torch.stack(self.answers(items))

    def answers(self, items: Sequence) -> list:
        """N items → N answers, in their order."""
        if new := [item for item in dict.fromkeys(items) if item not in self.cache]:
            self.cache.update(zip(new, self._compute(new), strict=True))
        return [self.cache[item] for item in items]

    def _compute(self, items: Sequence) -> list:
        processes, size = self.batching.processes, self.batching.batch_size
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        if len(batches) == 1:  # cheaper on every rank than a collective
            return list(self._encode(batches[0]))
        done, outputs = processes.counter(), {}
        with progress(self.name, len(items), 0, self.batching.console, transient=True) as show:
            for number in processes.distribute(len(batches)):
                outputs[number] = self._encode(batches[number])
                show(done(len(batches[number])))
        for others in processes.gather(outputs):
            outputs |= others
        return [row for number in range(len(batches)) for row in outputs[number]]

    def _encode(self, items: Sequence) -> Any:
        return self.encode([self.read(item) for item in items])
