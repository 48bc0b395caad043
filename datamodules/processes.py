"""Work spread over processes that comes back in its order, whatever their number."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from datamodules.errors import DataError

T = TypeVar("T")
AHEAD = 4
"""Tasks under way for each process: enough to keep all busy, few enough for memory."""


def ordered_map(function: Callable[[Any], T], tasks: Iterable[Any], processes: int | None) -> Iterator[T]:
    """`map` over `processes` processes (None: one for each CPU core); `tasks` are taken only as they are needed.

    Raises:
        DataError: a process was killed.
    """
    count = processes or os.cpu_count() or 1
    if count == 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the parent has threads (progress bar, torch), which a fork would leave half-copied.
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_keep_function, initargs=(function,)
    )
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            with interrupts_held_back():
                waiting.append(pool.submit(_call_function, task))
            if len(waiting) >= AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {count} processes was killed, perhaps for want of memory; set processes to fewer and start again."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Kept:
    """What a worker process applies: sent once, not with every task."""

    function: Callable[[Any], Any]


def _keep_function(function: Callable[[Any], Any]) -> None:
    _Kept.function = function


def _call_function(task: Any) -> Any:
    return _Kept.function(task)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, and never reaches a process started in it: those inherit the mask.

    The terminal interrupts the whole group, and each process would print a traceback, the loudest while it starts.
    The mask alone does not hold back the block itself: another thread (of a linear algebra library) may take the
    signal, and Python then raises KeyboardInterrupt here, between a process and what it is being told to do.
    """
    handler = signal.getsignal(signal.SIGINT)
    held: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: held.append(frame))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if held and callable(handler):
            handler(signal.SIGINT, held[0])
