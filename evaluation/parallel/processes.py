"""The processes of one launch, over torch.distributed (gloo).

They meet only to exchange results, and work goes to whoever is free, by a counter in torchrun's store. A process that
fails tells the others why; one that dies closes its connections, and the others end with an error that names it.
"""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from textwrap import shorten
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import DistError, HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from evaluation.protocols.requests import EvaluationError

Value = TypeVar("Value")
ANSWER = timedelta(minutes=5)
"""Within which the launch's store answers."""
LONGEST_WAIT = timedelta(days=7)
"""For a process that works; one that dies is noticed at once."""
LAST_WORDS_SECONDS = 2.0
"""Within which a process that fails has told why."""


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

    def counter(self) -> "Counter":
        """A number that all processes add to, nought at first."""
        self._calls += 1
        return Counter(self, f"counter/{self._calls}")

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
                    if self._store.check([f"failed/{rank}"]):
                        told = self._store.get(f"failed/{rank}").decode()
                        return ProcessError(f"{self._named(rank)} failed: {told}")
                time.sleep(0.1)
            late = [rank for rank in others if self._call_of(rank) < self._calls] or others
        except DistError:
            late = [0]
        return ProcessError(
            f"{' or '.join(map(self._named, late))} died ({shorten(str(error), 160)}); start the same command again, "
            "and it goes on from here."
        )

    def _call_of(self, rank: int) -> int:
        return int(self._store.get(f"at/{rank}")) if self._store.check([f"at/{rank}"]) else 0

    def _named(self, rank: int) -> str:
        try:
            known = self._store.check([f"host/{rank}"])
            host = self._store.get(f"host/{rank}").decode() if known else "unknown host"
        except DistError:
            host = "its node cannot be reached"
        return f"process {rank} of {self.count} ({host})"


class Counter:
    """See `Processes.counter`."""

    def __init__(self, processes: Processes, key: str):
        self._processes, self._key = processes, key

    def add(self, amount: int) -> int:
        """The number after adding."""
        try:
            return self._processes._store.add(self._key, amount)
        except DistError as error:
            raise self._processes._explained(error) from error

    def take(self) -> int:
        """0, 1, 2, …: each once, whichever process asks."""
        return self.add(1) - 1
