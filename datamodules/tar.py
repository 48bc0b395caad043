"""Read samples from tars: locate them by reading the headers one after the other, then read their members.

Samples are grouped as by WebDataset: their files follow each other and share a key, the name up to the first dot. Files
without a key or a suffix (`.DS_Store`, `._x.jpg`, `README`) belong to no sample.
"""

import io
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import SampleError, ShardError
from datamodules.images import Limits

BLOCK = 512
READ_AHEAD = 16 * 1024  # bytes per read of headers, so that one read covers several samples of short texts
MAX_HEADER = 1024 * 1024
MAX_PAX = 4 * 1024
MAX_BUFFER = 8 * 1024 * 1024
OPEN_FILES = 64
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
ADLER_PRIME = 65521
NO_PREFIX = bytes(BLOCK - 345)
KEY = re.compile(r"(?!__[^/]*__(?:/|$))((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # like webdataset, skips __names__
PAX_KEY = re.compile(rb"\d+ ([^=\n]+)=")
PAX_TIMES = frozenset((b"mtime", b"atime", b"ctime"))
PLAIN_SUFFIXES = frozenset(("txt", "json", "jpg", "jpeg", "png", "webp"))
GZIP = b"\x1f\x8b"

Read = Callable[[int, int], bytes]  # position, size → bytes, fewer at the end


class Entry(NamedTuple):
    """One entry of a tar: its content starts at `begin`, the next header at `end`.

    `name` is None for a folder. `plain` is true for an ordinary file with an ordinary header. `refused` says what the
    entry is if it is neither a file nor a folder.
    """

    name: str | None
    begin: int
    size: int
    end: int
    plain: bool = True
    refused: str = ""


class Group(NamedTuple):
    """One sample: from its first header to the end of its last file; position and size of its `txt`, size -1 if not
    known."""

    begin: int
    end: int
    text: int
    text_size: int


class OpenFiles:
    """An LRU cache of open files. `pread` uses no shared position, so that forked processes can share them."""

    def __init__(self):
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, position: int, size: int) -> bytes:
        """Return bytes position … position+size-1, fewer at the end of the file. Raises OSError."""
        if path in self._open:
            self._open.move_to_end(path)
        else:
            while len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        return os.pread(self._open[path], size, position)

    def close(self, path: str) -> None:
        """Close a file, so that its disk space is freed as soon as it is deleted."""
        if path in self._open:
            os.close(self._open.pop(path))

    def __getstate__(self) -> dict:
        return {"_open": OrderedDict()}

    def __del__(self):
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


class Tar:
    """A local tar.

    Args:
        path: path of the file.
        files: cache of open files.
        name: name of the shard in messages; None uses the file's name.
    """

    def __init__(self, path: str | Path, files: OpenFiles, name: str | None = None):
        self.path, self.files, self.name = str(path), files, name or Path(path).name
        self._buffer, self._origin = b"", 0

    def groups(self) -> Iterator[Group]:
        """Yield the positions of the samples in order.

        Raises:
            SampleError: `damaged_tar` or `truncated_tar`, after the last sample that can be found.
            OSError: the file cannot be read.
        """
        key, begin, end, suffixes, text = None, 0, 0, [], (0, -1)
        position, broken = 0, None
        while True:
            try:
                entry = read_entry(self._ahead, position)
            except (EOFError, tarfile.TarError) as error:
                entry, broken = None, error
            if entry is None:
                if broken is None and position > self.size:  # the last file is truncated
                    key, broken = None, EOFError(f"the tar ends at byte {self.size}")
                if key is not None:
                    yield Group(begin, end, *_text(suffixes, text))
                if broken is not None:
                    reason = "truncated_tar" if isinstance(broken, EOFError) else "damaged_tar"
                    raise self._error(reason, f"at byte {position}", str(broken)) from broken
                return
            entry_key, suffix = split_name(entry.name) if entry.name is not None else (None, "")
            if entry_key is not None:
                if entry_key != key:
                    if key is not None:
                        yield Group(begin, end, *_text(suffixes, text))
                    key, begin, suffixes, text = entry_key, position, [], (0, -1)
                end = entry.end
                suffixes.append(suffix if entry.plain else "")
                if suffix == "txt":
                    text = entry.begin, entry.size
            position = entry.end

    def read(
        self, begin: int, end: int, limits: Limits, suffixes: Container[str] | None = None
    ) -> tuple[str, dict[str, bytes]]:
        """Return key and members of the sample at `begin` … `end`.

        Args:
            suffixes: members to read; all others map to b"". None reads all members.

        Raises:
            SampleError: `unreachable_shard`, `truncated_tar`, `damaged_tar`, `member_too_large`, `duplicate_member`
                or `refused_member`.
        """
        key, position = "", begin
        members: dict[str, bytes] = {}
        try:
            read = self._group(begin, end, whole=suffixes is None)
            while position < end:
                entry = read_entry(read, position)
                if entry is None:
                    raise EOFError(f"the tar ends at byte {position}")
                position = entry.end
                entry_key, suffix = split_name(entry.name) if entry.name is not None else (None, "")
                if entry_key is None:
                    continue
                key = entry_key
                if entry.refused:
                    raise self._error("refused_member", key, f"'{entry.name}' is {entry.refused}; only files are read")
                if entry.size > limits.max_member_bytes:
                    detail = f"'{suffix}' has {entry.size} bytes, at most {limits.max_member_bytes}"
                    raise self._error("member_too_large", key, detail)
                if suffix in members:
                    raise self._error("duplicate_member", key, f"'{suffix}' occurs twice")
                wanted = suffixes is None or suffix in suffixes
                members[suffix] = read(entry.begin, entry.size) if wanted else b""
                if wanted and len(members[suffix]) != entry.size:
                    detail = f"'{suffix}' ends after {len(members[suffix])} of {entry.size} bytes"
                    raise self._error("truncated_tar", key, detail)
        except tarfile.TarError as error:
            raise self._error("damaged_tar", key or f"at byte {position}", str(error)) from error
        except EOFError as error:
            raise self._error("truncated_tar", key or f"at byte {position}", str(error)) from error
        except OSError as error:
            raise self._error("unreachable_shard", key or f"at byte {position}", str(error)) from error
        return key, members

    def read_text(self, group: Group, limits: Limits) -> tuple[str, bytes] | None:
        """Return key and `txt` of a sample with one small read; None if `read` is needed."""
        if not 0 <= group.text_size <= limits.max_member_bytes:
            return None
        try:
            content = self.files.read(self.path, group.text - BLOCK, BLOCK + group.text_size)
        except OSError:
            return None
        header = _plain(content[:BLOCK])
        if header is None or header[1] != group.text_size or len(content) != BLOCK + group.text_size:
            return None
        key = split_name(header[0])[0]
        return None if key is None else (key, content[BLOCK:])

    @property
    def size(self) -> int:
        """Size in bytes. Raises OSError."""
        return os.stat(self.path).st_size

    def _ahead(self, position: int, size: int) -> bytes:
        begin = position - self._origin
        if not 0 <= begin <= begin + size <= len(self._buffer):
            self._buffer, self._origin = self.files.read(self.path, position, max(size, READ_AHEAD)), position
            begin = 0
        return self._buffer[begin : begin + size]

    def _group(self, begin: int, end: int, whole: bool) -> Read:
        buffer = self.files.read(self.path, begin, min(end - begin, MAX_BUFFER if whole else READ_AHEAD))

        def read(position: int, size: int) -> bytes:
            if position + size <= begin + len(buffer):
                return buffer[position - begin : position - begin + size]
            return self.files.read(self.path, position, size)

        return read

    def _error(self, reason: str, key: str, detail: str) -> SampleError:
        return SampleError(reason, self.name, key, detail)


def read_shard(path: str | Path, limits: Limits | None = None) -> Iterator[tuple[str, dict[str, bytes]] | SampleError]:
    """Yield (key, members) of each sample of a tar, or the error that makes it unusable. Everything after a damaged
    header counts as one sample.

    Raises:
        ShardError: the file cannot be read, is not a tar, or is longer than an empty tar and holds no sample.
    """
    tar = Tar(path, OpenFiles())
    for group in find_samples(tar):
        try:
            yield group if isinstance(group, SampleError) else tar.read(group.begin, group.end, limits or Limits())
        except SampleError as error:
            yield error


def find_samples(tar: Tar) -> Iterator[Group | SampleError]:
    """Yield the positions of a tar's samples and, if it is damaged, the error at the end. Raises ShardError as
    `read_shard` does."""
    count = 0
    try:
        if tar.files.read(tar.path, 0, 2) == GZIP:
            raise ShardError(f"'{tar.name}' is compressed, but only uncompressed tars can be read; decompress it.")
        for group in tar.groups():
            count += 1
            yield group
    except SampleError as error:
        if not count:
            raise ShardError(f"'{tar.name}' is not a readable tar ({error.detail}); replace or remove it.") from error
        yield error
    except OSError as error:
        raise ShardError(f"'{tar.name}' cannot be read: {error}.") from error
    if not count and tar.size > tarfile.RECORDSIZE:
        raise ShardError(f"'{tar.name}' holds no samples; replace or remove it.")


def read_entry(read: Read, position: int) -> Entry | None:
    """Return the entry whose header is at `position`; None at the end of the tar.

    Raises:
        EOFError: the tar is truncated here.
        tarfile.TarError: the header is damaged.
    """
    header, start = read(position, BLOCK), position
    if not header and position > 0:  # the blocks of zeros at the end are missing
        return None
    if len(header) < BLOCK:
        raise EOFError(f"the tar ends at byte {position + len(header)}")
    if not header[0] and header.count(0) == BLOCK:
        return None
    # webdataset writes an extended header before each file, to store fractions of a second of its time.
    if header[156:157] == tarfile.XHDTYPE and (times := _pax_times(read, header, start)):
        start += times
        header = read(start, BLOCK)
    if (plain := _plain(header)) is not None:
        name, size = plain
        return Entry(name, start + BLOCK, size, start + BLOCK + _padded(size), start == position)
    return _by_tarfile(read, position)


def _pax_times(read: Read, header: bytes, position: int) -> int:
    """Return the size in bytes of an extended header that contains only times, else 0."""
    if (fields := _checked(header)) is None or fields[1] > MAX_PAX:
        return 0
    records = read(position + BLOCK, fields[1])
    names = PAX_KEY.findall(records)
    return BLOCK + _padded(fields[1]) if names and PAX_TIMES.issuperset(names) else 0


def _plain(header: bytes) -> tuple[str, int] | None:
    """Parse name and size from an ordinary USTAR header of a file; None for any other header, which tarfile parses.

    This is an optimization: `TarInfo.frombuf` takes 20 µs per member, a third of the total time to read captions.
    """
    return _checked(header) if header[156:157] in REGULAR and header[345:] == NO_PREFIX else None


def _checked(header: bytes) -> tuple[str, int] | None:
    if header[257:262] != b"ustar":
        return None
    try:
        checksum, size = int(header[148:156].rstrip(b"\0 "), 8), int(header[124:136].rstrip(b"\0 "), 8)
        name = header[:100].rstrip(b"\0").decode("utf-8")
    except ValueError:
        return None
    # The checksum is the sum of all bytes, with its own field counted as eight spaces. The lower half of Adler-32 is
    # the sum of all bytes plus one, modulo its prime, and ten times as fast as a sum in Python.
    computed = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    return (name, size) if size >= 0 and (computed - checksum) % ADLER_PRIME == 0 else None


def _by_tarfile(read: Read, position: int) -> Entry:
    try:
        with tarfile.open(fileobj=_Headers(read, position), mode="r:") as tar:  # type: ignore[arg-type]
            member = tar.next()
    except tarfile.TarError:
        raise
    except Exception as error:  # on malformed headers, tarfile raises almost any exception
        raise tarfile.HeaderError(f"{type(error).__name__}: {error}") from error
    if member is None:
        raise EOFError(f"the tar ends at byte {position}")
    if member.size < 0:
        raise tarfile.HeaderError(f"the size is {member.size} bytes")
    begin, refused = position + member.offset_data, ""
    if member.issparse():
        refused = "sparse"
    elif member.issym() or member.islnk():
        refused = f"a link to '{member.linkname}'"
    elif not member.isfile() and not member.isdir():
        refused = "a device or a pipe"
    # Names that are not UTF-8 are escaped, because they could not be logged or compared.
    name = None if member.isdir() else member.name.encode(errors="backslashreplace").decode()
    size = member.size if member.isreg() else 0
    end = position + tar.offset if refused == "sparse" else begin + _padded(size)
    return Entry(name, begin, size, end, False, refused)


class _Headers(io.RawIOBase):
    """A file object for `tarfile` that starts at some header. Raises OSError if a read exceeds `MAX_HEADER` bytes."""

    def __init__(self, read: Read, origin: int):
        self._read, self._origin, self._position = read, origin, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset if whence == os.SEEK_SET else self._position + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise OSError(f"a header of {size} bytes; at most {MAX_HEADER} are allowed")
        content = self._read(self._origin + self._position, size)
        self._position += len(content)
        return content


def split_name(name: str) -> tuple[str | None, str]:
    """Split a member name at the first dot of its file name into (key, suffix), as WebDataset does; (None, "") without
    a dot."""
    match = KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else (None, "")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(suffixes: list[str], text: tuple[int, int]) -> tuple[int, int]:
    plain = len(set(suffixes)) == len(suffixes) and PLAIN_SUFFIXES.issuperset(suffixes)
    return text if plain else (0, -1)
