"""Input files: which they are, and their lines, decompressed as they are read.

A line longer than allowed is skipped in pieces, so neither a corrupt file nor a decompression bomb fills the memory.
"""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from datamodules.errors import DataError, SampleError

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = (*OPENERS, ".zst", ".zip")
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def pyarrow(path: Path) -> Any:
    """The pyarrow package. Raises DataError: it is not installed."""
    try:
        import pyarrow as package
    except ImportError as error:
        raise DataError(
            f"reading '{path.name}' needs pyarrow, which is not installed; pip install 'kosmosg[curate]' brings it."
        ) from error
    return package


def find_files(source: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or all files below a folder whose names end in one of `suffixes`, compressed or not.

    Raises:
        DataError: there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"there is nothing at '{source}'.")
    found = sorted(path for path in source.rglob("*") if path.is_file() and plain_suffix(path) in suffixes)
    if not found:
        raise DataError(f"'{source}' holds no file that ends in {', '.join(suffixes)} (or those with .gz, .zst, .zip).")
    return found


def plain_suffix(path: Path) -> str:
    """The suffix without that of a compression: `.jsonl` of `a.jsonl.gz`."""
    compressed = path.suffix.lower() in COMPRESSED
    return Path(path.stem if compressed else path.name).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed; a zip's members one after the other."""
    suffix = path.suffix.lower()
    if suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            yield _Joined(archive)  # type: ignore[misc]
        return
    if suffix == ".zst":
        with io.BufferedReader(pyarrow(path).input_stream(str(path), compression="zstd")) as stream:
            yield stream  # type: ignore[misc]
        return
    with OPENERS.get(suffix, open)(path, "rb") as stream:
        yield stream


class _Joined:
    """The members of a zip as one stream. Nothing is unpacked, so no name of a member is a path."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive, self.left = archive, [info for info in archive.infolist() if not info.is_dir()]
        self.stream: IO[bytes] | None = None

    def readline(self, limit: int = -1) -> bytes:
        """The next line; b"" after the last member."""
        while True:
            line = self.stream.readline(limit) if self.stream else b""
            if line or not self.left:
                return line
            self.stream = self.archive.open(self.left.pop(0))

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        pieces = []
        while size > 0 and (piece := self.readline(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


def lines(path: Path, start: int, limit: int, name: str) -> Iterator[tuple[int, bytes | SampleError]]:
    """(number from 0, line without its end) from line `start` on; blank lines are numbered and left out.

    A line above `limit` bytes is an error in its place; a file that cannot be read on is an error and ends.
    """
    number = -1
    try:
        with opened(path) as stream:
            while True:
                number += 1
                line = stream.readline(limit + 2)
                if not line:
                    return
                whole = line.endswith(b"\n") or len(line) <= limit
                while not whole and not line.endswith(b"\n") and line:
                    line = stream.readline(limit)
                if number < start:
                    continue
                if not whole:
                    yield number, SampleError("record_too_large", name, str(number), f"more than {limit} bytes")
                elif line.strip(b"\r\n"):
                    yield number, line.rstrip(b"\r\n")
    except DAMAGED as error:
        yield number, SampleError("damaged_file", name, str(number), f"{type(error).__name__}: {error}")
