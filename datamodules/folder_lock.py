"""Lock an output folder against other writers."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datamodules.errors import DataError


@contextmanager
def folder_lock(output: Path) -> Iterator[None]:
    """Lock a folder, which is created if absent. Raises DataError if another process holds the lock."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is writing to '{output}'; wait for it or set another output=…") from error
        yield
