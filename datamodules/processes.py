"""Map a function over processes, with results in the order of the tasks."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from datamodules.errors import DataError

T = TypeVar("T")
PENDING_PER_PROCESS = 4  # tasks: enough to keep all processes busy, few enough to fit into memory


def ordered_map(function: Callable[[Any], T], tasks: Iterable[Any], processes: int | None) -> Generator[T, None, None]:
    """`map` on `processes` processes (None: one per CPU core). `tasks` is consumed only as needed.

    Raises:
        DataError: a process was killed.
    """
    count = processes or os.cpu_count() or 1
    if count == 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked, because the parent has threads (progress bar, torch).
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_set_function, initargs=(function,))
    pending: deque[Future[T]] = deque()
    try:
        for task in tasks:
            with interrupts_delayed():
                pending.append(pool.submit(_call_function, task))
            if len(pending) >= PENDING_PER_PROCESS * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {count} processes was killed, perhaps for lack of memory. Start again with a smaller value of "
            "processes."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """The function that a worker process applies; it is sent once and not with every task."""

    function: Callable[[Any], Any]


def _set_function(function: Callable[[Any], Any]) -> None:
    _Worker.function = function


def _call_function(task: Any) -> Any:
    return _Worker.function(task)


@contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, and block it in processes started in it, which inherit the mask.

    The terminal sends SIGINT to all processes of the group, and without the mask each would print a traceback. The mask
    alone does not protect the block: another thread, e.g. of a linear algebra library, may receive the signal, and
    Python would raise KeyboardInterrupt here, while a process is being started.
    """
    handler = signal.getsignal(signal.SIGINT)
    received: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: received.append(frame))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if received and callable(handler):
            handler(signal.SIGINT, received[0])
