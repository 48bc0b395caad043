"""The processes of one launch: `torchrun --nproc-per-node 8 evaluate.py …`, on one node or several.

Notable: no collective operations. What the processes tell each other are a few words and counters in the store that
torchrun keeps anyway; images and features go through the file system that they share. So nothing times out while one
works for hours and the others wait, work goes to whoever is free, and a process that fails or falls silent is noticed
by name. One process alone has a store of its own and takes the same way.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch.distributed import DistError, HashStore, Store
from torch.distributed.rendezvous import rendezvous

from evaluation.protocols.requests import EvaluationError

SILENCE_SECONDS = 600.0
"""After which a process is taken for dead; torchrun notices most deaths at once, and ends the others itself."""
BEAT_SECONDS, POLL_SECONDS, ANSWER_SECONDS = 5.0, 0.2, 300.0
PIECE = 1 << 20  # bytes; the store refuses values above 8 MiB


class ProcessError(EvaluationError):
    """Another process of the launch failed or died; says which."""


class Processes:
    """This process among `count`; every one of them makes the same calls in the same order.

    Args:
        rank: of this process, 0 … count - 1. The first one decides, merges and shows; it scores alone.
        local_rank: among the processes of its machine: the number of its GPU.
        store: what all of them share.
        silence: seconds without a sign of life after which another process is taken for dead.
    """

    def __init__(self, rank: int, count: int, local_rank: int, store: Store, silence: float = SILENCE_SECONDS):
        self.rank, self.count, self.local_rank, self.silence = rank, count, local_rank, silence
        self._store, self._calls = store, 0
        self._left = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}

    @classmethod
    def alone(cls) -> "Processes":
        """This one and no other."""
        return cls(0, 1, 0, HashStore())

    @classmethod
    def of_environment(cls) -> "Processes":
        """As torchrun's variables say (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); else one process."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls.alone()
        store, rank, count = next(rendezvous("env://", timeout=timedelta(seconds=ANSWER_SECONDS)))
        return cls(rank, count, int(os.environ.get("LOCAL_RANK", "0")), store)

    @property
    def first(self) -> bool:
        """Whether this is the one that decides, merges, scores and shows."""
        return self.rank == 0

    def __enter__(self) -> "Processes":
        self._set(f"host/{self.rank}", socket.gethostname())
        if self.count > 1:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave together; after an exception, tell the others to stop."""
        try:
            if error is None:
                self.wait()
                # Where the first process hosts the store itself, it outlives everyone's last question.
                self._add("gone", 1)
                if self.first:
                    self._until(lambda: self._add("gone", 0) == self.count)
            elif not isinstance(error, ProcessError):
                self._set(f"failed/{self.rank}", f"{kind.__name__ if kind else 'error'}: {error}")
        except ProcessError:
            if error is None:
                raise
        finally:
            self._left.set()

    def share(self, make: Callable[[], Any]) -> Any:
        """What the first process makes (plain JSON values), in all of them."""
        key = self._next_key("share")
        if not self.first:
            self._until(lambda: self._has(key))
            pieces = int(self._get(key))
            return json.loads(b"".join(self._get(f"{key}/{piece}") for piece in range(pieces)))
        value = make()
        if self.count > 1:
            content = json.dumps(value).encode()
            pieces = [content[start : start + PIECE] for start in range(0, len(content), PIECE)]
            for number, piece in enumerate(pieces):
                self._set(f"{key}/{number}", piece)
            self._set(key, str(len(pieces)))
        return value

    def counter(self) -> "Counter":
        """A number that all processes add to, nought at first."""
        return Counter(self, self._next_key("counter"))

    def wait(self) -> None:
        """Until all processes are here, however long it takes.

        Raises:
            ProcessError: one of them failed or fell silent.
        """
        arrived = self.counter()
        arrived.add(1)
        self._until(lambda: arrived.value == self.count)

    def _until(self, reached: Callable[[], bool]) -> None:
        checked = time.monotonic()
        while not reached():
            if time.monotonic() - checked >= min(1.0, self.silence / 4):
                self._require_all_alive()
                checked = time.monotonic()
            self._left.wait(POLL_SECONDS if self.count > 1 else 0.0)

    def _require_all_alive(self) -> None:
        for rank in range(self.count):
            if rank == self.rank:
                continue
            if self._has(f"failed/{rank}"):
                raise ProcessError(f"{self._named(rank)} failed: {self._get(f'failed/{rank}').decode()}")
            beats, now = self._add(f"alive/{rank}", 0), time.monotonic()
            if rank not in self._heard or self._heard[rank][0] != beats:
                self._heard[rank] = (beats, now)
            elif now - self._heard[rank][1] > self.silence:
                raise ProcessError(
                    f"{self._named(rank)} has given no sign of life for {self.silence:.0f} s; start the same command "
                    "again, and it goes on from here."
                )

    def _named(self, rank: int) -> str:
        host = self._get(f"host/{rank}").decode() if self._has(f"host/{rank}") else "unknown host"
        return f"process {rank} of {self.count} ({host})"

    def _beat(self) -> None:
        try:
            while not self._left.wait(min(BEAT_SECONDS, self.silence / 8)):
                self._add(f"alive/{self.rank}", 1)
        except ProcessError:
            return  # whoever asks the store next is told

    def _next_key(self, kind: str) -> str:
        self._calls += 1
        return f"{kind}/{self._calls}"

    def _has(self, key: str) -> bool:
        return self._ask(lambda: self._store.check([_full(key)]))

    def _get(self, key: str) -> bytes:
        return self._ask(lambda: self._store.get(_full(key)))

    def _set(self, key: str, value: str | bytes) -> None:
        self._ask(lambda: self._store.set(_full(key), value))

    def _add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self._store.add(_full(key), amount))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except DistError as error:
            raise ProcessError(
                f"process {self.rank} of {self.count} cannot reach the first one's node any more ({error})."
            ) from error


class Counter:
    """See `Processes.counter`."""

    def __init__(self, processes: Processes, key: str):
        self._processes, self._key = processes, key

    def add(self, amount: int) -> int:
        """The number after adding."""
        return self._processes._add(self._key, amount)

    def take(self) -> int:
        """0, 1, 2, …: each once, whichever process asks."""
        return self.add(1) - 1

    @property
    def value(self) -> int:
        """What all have added."""
        return self.add(0)


def _full(key: str) -> str:
    return f"kosmosg-evaluation/{key}"
