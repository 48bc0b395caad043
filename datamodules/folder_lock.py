"""One writer in a folder at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datamodules.errors import DataError


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Nobody else writes here meanwhile. Raises DataError: somebody does."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is writing to '{output}'; wait for it or set another output=…") from error
        yield
