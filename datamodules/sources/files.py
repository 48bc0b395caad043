"""Input files: which they are, and their lines, decompressed as they are read.

A line longer than allowed is skipped in pieces, so neither a corrupt file nor a decompression bomb fills the memory.
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
"""What zipfile and pyarrow raise for hostile files; RuntimeError: what zipfile cannot decrypt or decompress."""
NOT_UTF_8 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32's little end begins as UTF-16's


@dataclass(frozen=True)
class Unreadable:
    """In the place of a record that cannot be read: why, as in a SampleError."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Record:
    """One record of the input: a line, a row, a folder.

    Attributes:
        file, number: which of the input's files, and the record's place in it.
        name: of the file, for messages.
        content: what was read; an `Unreadable` where it could not be.
    """

    file: int
    number: int
    name: str
    content: Any

    def error(self, reason: str, detail: str = "") -> SampleError:
        """An error that names this record."""
        return SampleError(reason, self.name, str(self.number), detail)

    def filtered(self, reason: str, detail: str = "") -> FilteredSample:
        """A sound record that the settings leave out."""
        return FilteredSample(reason, self.name, str(self.number), detail)


def pyarrow(path: Path) -> Any:
    """The pyarrow package. Raises DataError: it is not installed."""
    try:
        import pyarrow as package
    except ImportError as error:
        raise DataError(
            f"'{path.name}' needs pyarrow, which is not installed; pip install 'kosmosg[curate]' brings it."
        ) from error
    return package


def is_hidden(name: str | PurePath) -> bool:
    """Whether a file, or a folder above it, has a name that begins with a dot: macOS' `._a.jpg`, `.DS_Store`."""
    return any(part.startswith(".") and part != ".." for part in PurePath(name).parts)


def find_files(source: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or all files below a folder whose names end in one of `suffixes`, compressed or not.

    Raises:
        DataError: there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"there is no file or folder '{source}'.")
    found = visible_files(source, lambda path: plain_suffix(path) in suffixes)
    if not found:
        raise DataError(f"'{source}' holds no file that ends in {', '.join(suffixes)} (or those with .gz, .zst, .zip).")
    return found


def visible_files(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """The wanted ones of all regular files below a folder, links to them included; hidden ones are passed over."""
    found = (path for path in folder.rglob("*") if wanted(path) and not is_hidden(path.relative_to(folder)))
    return sorted(path for path in found if path.is_file())


def plain_suffix(path: Path) -> str:
    """The suffix without that of a compression: `.jsonl` of `a.jsonl.gz`."""
    compressed = path.suffix.lower() in COMPRESSED
    return Path(path.stem if compressed else path.name).suffix.lower()


def read_streams(path: Path, read: Callable[[IO[bytes]], Iterator[T]]) -> Iterator[T | Unreadable]:
    """What `read` makes of a file decompressed, or of each member of a zip. Nothing is unpacked to the disk.

    What cannot be read on (damaged, encrypted, of an unknown method) is one `damaged_file` in its place.
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
    """The rest of a file that cannot be read on."""
    return Unreadable("damaged_file", f"{name}{type(error).__name__}: {error}")


def lines(stream: IO[bytes], limit: int) -> Iterator[bytes | Unreadable]:
    """Lines with their ends, which "\\n" alone makes; one above `limit` bytes is a `record_too_large` in its place."""
    first = True
    while line := stream.readline(limit + 2):
        if first and line.startswith(NOT_UTF_8):  # whose lines would pass for UTF-8 with NULs
            yield Unreadable("not_utf8", "the file is UTF-16 or UTF-32; save it as UTF-8")
            return
        whole, rest, first = line.endswith(b"\n") or len(line) <= limit, line, False
        while not whole and rest and not rest.endswith(b"\n"):
            rest = stream.readline(limit)
        yield line if whole else Unreadable("record_too_large", f"more than {limit} bytes")
