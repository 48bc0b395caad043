"""Processes that a run starts itself for trainer.devices, and what each of them answers with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

LAUNCHER = "KOSMOSG_LAUNCHER"  # id of the process that started further ones


def launched_by_ourselves() -> bool:
    """Whether the first process started this one for trainer.devices. It tells the exit status for both: Lightning
    kills it as soon as another one's is not 0."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


@contextmanager
def named_launcher() -> Iterator[None]:
    """Processes that are started inside know this one for theirs; those that are started later do not."""
    if launched_by_ourselves():
        yield
        return
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[LAUNCHER]
