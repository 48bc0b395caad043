"""Find input files and read their lines, decompressed on the fly.

Lines that are too long are skipped piece by piece, so that corrupt files and decompression bombs cannot fill memory.
"""

import bz2
import codecs
import gzip
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import IO, Any, TypeVar

from datamodules.errors import DataError, FilteredSample, SampleError

T = TypeVar("T")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = (*OPENERS, ".zst", ".zip")
DAMAGED = (OSError, EOFError, MemoryError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, struct.error)
UNOPENABLE = (*DAMAGED, RuntimeError, ValueError, LookupError)
"""Errors of zipfile and pyarrow for malformed files; zipfile raises RuntimeError for encrypted members."""
NOT_UTF_8 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins like UTF-16-LE


@dataclass(frozen=True)
class Unreadable:
    """Replaces the content of a record that cannot be read; reason and detail are as in SampleError."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Record:
    """One record of the input: a line, a row, a folder.

    Attributes:
        file, number: index of the input file, and of the record in the file.
        name: name of the file in messages.
        content: the content of the record, or `Unreadable`.
    """

    file: int
    number: int
    name: str
    content: Any

    def error(self, reason: str, detail: str = "") -> SampleError:
        """Return an error that names this record."""
        return SampleError(reason, self.name, str(self.number), detail)

    def filtered(self, reason: str, detail: str = "") -> FilteredSample:
        """Return an error for a valid record that the settings exclude."""
        return FilteredSample(reason, self.name, str(self.number), detail)


def pyarrow(path: Path) -> Any:
    """Import pyarrow. Raises DataError if it is not installed."""
    try:
        import pyarrow as package
    except ImportError as error:
        raise DataError(
            f"'{path.name}' needs pyarrow, which is not installed; install it with: pip install 'kosmosg[curate]'"
        ) from error
    return package


def is_hidden(name: str | PurePath) -> bool:
    """Whether a part of the path begins with a dot, as in macOS' `._a.jpg` and `.DS_Store`."""
    return any(part.startswith(".") and part != ".." for part in PurePath(name).parts)


def find_files(source: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the file itself, or all files below a folder with one of the suffixes, compressed or not.

    Raises:
        DataError: there is no such file.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"there is no file or folder '{source}'.")
    files = visible_files(source, lambda path: plain_suffix(path) in suffixes)
    if not files:
        raise DataError(f"'{source}' holds no file that ends in {', '.join(suffixes)} (or those with .gz, .zst, .zip).")
    return files


def visible_files(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """Return all wanted files below a folder, sorted, including links to files but no hidden files."""
    paths = (path for path in folder.rglob("*") if wanted(path) and not is_hidden(path.relative_to(folder)))
    return sorted(path for path in paths if path.is_file())


def plain_suffix(path: Path) -> str:
    """Return the suffix without that of the compression: `.jsonl` for `a.jsonl.gz`."""
    compressed = path.suffix.lower() in COMPRESSED
    return Path(path.stem if compressed else path.name).suffix.lower()


def read_streams(path: Path, read: Callable[[IO[bytes]], Iterator[T]]) -> Iterator[T | Unreadable]:
    """Yield the results of `read` for a decompressed file, or for each member of a zip. Nothing is written to the disk.

    The unreadable rest of a file (damaged, encrypted, unknown compression) is yielded as one `damaged_file`.
    """
    suffix = path.suffix.lower()
    if suffix == ".zst":
        yield from _read(lambda: io.BufferedReader(pyarrow(path).input_stream(str(path), compression="zstd")), read)
    elif suffix != ".zip":
        yield from _read(partial(OPENERS.get(suffix, open), path, "rb"), read)
    else:
        try:
            archive = zipfile.ZipFile(path)
        except UNOPENABLE as error:
            yield damaged(error)
            return
        with archive:
            for info in archive.infolist():
                if not info.filename.endswith("/") and not is_hidden(info.filename):
                    yield from _read(partial(archive.open, info), read, f"{info.filename}: ")


def _read(opened: Callable[[], Any], read: Callable[[IO[bytes]], Iterator[T]], name: str = "") -> Iterator[Any]:
    try:
        stream = opened()
    except UNOPENABLE as error:
        yield damaged(error, name)
        return
    try:
        with stream:
            yield from read(stream)
    except DAMAGED as error:
        yield damaged(error, name)


def damaged(error: Exception, name: str = "") -> Unreadable:
    """Return the `Unreadable` that replaces the rest of a damaged file."""
    return Unreadable("damaged_file", f"{name}{type(error).__name__}: {error}")


def lines(stream: IO[bytes], limit: int) -> Iterator[bytes | Unreadable]:
    """Yield lines with their "\\n"; a line of more than `limit` bytes is replaced by a `record_too_large`."""
    first = True
    while line := stream.readline(limit + 2):
        if first and line.startswith(NOT_UTF_8):  # the lines would be read as UTF-8 with NULs
            yield Unreadable("not_utf8", "the file is UTF-16 or UTF-32; save it as UTF-8")
            return
        whole, rest, first = line.endswith(b"\n") or len(line) <= limit, line, False
        while not whole and rest and not rest.endswith(b"\n"):
            rest = stream.readline(limit)
        yield line if whole else Unreadable("record_too_large", f"more than {limit} bytes")
