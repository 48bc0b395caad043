"""Tars of samples: where each sample begins and ends, found by walking through the headers, and its members.

The files of one sample follow each other and share a key, the part of their name up to the first dot, as WebDataset
groups them. Files without a key or a suffix (`.DS_Store`, `._x.jpg`, `README`) belong to no sample.
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
AHEAD = 16 * 1024  # read at once while walking; neighbouring headers of short texts then need no further call
LARGEST_HEADER = 1024 * 1024
LARGEST_PAX = 4 * 1024
LARGEST_BUFFER = 8 * 1024 * 1024
OPEN_FILES = 64
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
ADLER_PRIME = 65521
NO_PREFIX = bytes(BLOCK - 345)
KEY = re.compile(r"(?!__[^/]*__(?:/|$))((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset skips __names__, too
PAX_KEY = re.compile(rb"\d+ ([^=\n]+)=")
PAX_TIMES = frozenset((b"mtime", b"atime", b"ctime"))
PLAIN_SUFFIXES = frozenset(("txt", "json", "jpg", "jpeg", "png", "webp"))
GZIP = b"\x1f\x8b"

Read = Callable[[int, int], bytes]  # position, size → bytes, fewer at the end


class Entry(NamedTuple):
    """One file of a tar: its content lies at `begin`, the next header at `end`.

    `plain`: an ordinary file with an ordinary header. `refused`: what it is, if it is neither a file nor a folder;
    `name` is None for a folder.
    """

    name: str | None
    begin: int
    size: int
    end: int
    plain: bool = True
    refused: str = ""


class Group(NamedTuple):
    """One sample: its first header and the end of its last file; where its `txt` lies, length -1 if one must look."""

    begin: int
    end: int
    text: int
    text_size: int


class OpenFiles:
    """Open files of one process, the least recently used closed first. `pread` keeps no position: forks may share."""

    def __init__(self):
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, position: int, size: int) -> bytes:
        """Bytes position … position+size-1, fewer at the end. Raises OSError."""
        if path in self._open:
            self._open.move_to_end(path)
        else:
            while len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        return os.pread(self._open[path], size, position)

    def close(self, path: str) -> None:
        """Before a file is deleted: its place on the disk is then free at once."""
        if path in self._open:
            os.close(self._open.pop(path))

    def __getstate__(self) -> dict:
        return {"_open": OrderedDict()}

    def __del__(self):
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


class Tar:
    """A tar on a disk.

    Args:
        path: of the file.
        files: keeps it open.
        name: of the shard, for messages; the file's own if None.
    """

    def __init__(self, path: str | Path, files: OpenFiles, name: str | None = None):
        self.path, self.files, self.name = str(path), files, name or Path(path).name
        self._buffer, self._origin = b"", 0

    def groups(self) -> Iterator[Group]:
        """The samples in order.

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
                if broken is None and position > self.size:  # the data of the last file break off
                    key, broken = None, EOFError(f"breaks off at byte {self.size}")
                if key is not None:
                    yield Group(begin, end, *_text(suffixes, text))
                if broken is not None:
                    reason = "truncated_tar" if isinstance(broken, EOFError) else "damaged_tar"
                    raise self._error(reason, f"at byte {position}", str(broken)) from broken
                return
            found, suffix = split_name(entry.name) if entry.name is not None else (None, "")
            if found is not None:
                if found != key:
                    if key is not None:
                        yield Group(begin, end, *_text(suffixes, text))
                    key, begin, suffixes, text = found, position, [], (0, -1)
                end = entry.end
                suffixes.append(suffix if entry.plain else "")
                if suffix == "txt":
                    text = entry.begin, entry.size
            position = entry.end

    def read(
        self, begin: int, end: int, limits: Limits, suffixes: Container[str] | None = None
    ) -> tuple[str, dict[str, bytes]]:
        """Key and members of the sample at `begin` … `end`.

        Args:
            suffixes: members that are wanted; the bytes of others are not read and they map to b"". None: all.

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
                    raise EOFError(f"ends at byte {position}")
                position = entry.end
                found, suffix = split_name(entry.name) if entry.name is not None else (None, "")
                if found is None:
                    continue
                key = found
                if entry.refused:
                    raise self._error("refused_member", key, f"'{entry.name}' is {entry.refused}; only files are read")
                if entry.size > limits.max_member_bytes:
                    detail = f"'{suffix}' has {entry.size} bytes, at most {limits.max_member_bytes}"
                    raise self._error("member_too_large", key, detail)
                if suffix in members:
                    raise self._error("duplicate_member", key, f"'{suffix}' is there twice")
                wanted = suffixes is None or suffix in suffixes
                members[suffix] = read(entry.begin, entry.size) if wanted else b""
                if wanted and len(members[suffix]) != entry.size:
                    detail = f"'{suffix}' breaks off after {len(members[suffix])} bytes"
                    raise self._error("truncated_tar", key, detail)
        except tarfile.TarError as error:
            raise self._error("damaged_tar", key or f"at byte {position}", str(error)) from error
        except EOFError as error:
            raise self._error("truncated_tar", key or f"at byte {position}", str(error)) from error
        except OSError as error:
            raise self._error("unreachable_shard", key or f"at byte {position}", str(error)) from error
        return key, members

    def read_text(self, group: Group, limits: Limits) -> tuple[str, bytes] | None:
        """Key and `txt` of a sample by one small read; None where `read` must look closer."""
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
        """Bytes. Raises OSError."""
        return os.stat(self.path).st_size

    def _ahead(self, position: int, size: int) -> bytes:
        begin = position - self._origin
        if not 0 <= begin <= begin + size <= len(self._buffer):
            self._buffer, self._origin = self.files.read(self.path, position, max(size, AHEAD)), position
            begin = 0
        return self._buffer[begin : begin + size]

    def _group(self, begin: int, end: int, whole: bool) -> Read:
        buffer = self.files.read(self.path, begin, min(end - begin, LARGEST_BUFFER if whole else AHEAD))

        def read(position: int, size: int) -> bytes:
            if position + size <= begin + len(buffer):
                return buffer[position - begin : position - begin + size]
            return self.files.read(self.path, position, size)

        return read

    def _error(self, reason: str, key: str, detail: str) -> SampleError:
        return SampleError(reason, self.name, key, detail)


def read_shard(path: str | Path, limits: Limits | None = None) -> Iterator[tuple[str, dict[str, bytes]] | SampleError]:
    """(key, members) of each sample of one tar in order, or the error that made it unusable. What follows a damaged
    header is one such sample.

    Raises:
        ShardError: the file cannot be read, is no tar, or is longer than an empty tar and holds no sample.
    """
    tar = Tar(path, OpenFiles())
    for group in find_samples(tar):
        try:
            yield group if isinstance(group, SampleError) else tar.read(group.begin, group.end, limits or Limits())
        except SampleError as error:
            yield error


def find_samples(tar: Tar) -> Iterator[Group | SampleError]:
    """The samples of a tar, at the end the error that it breaks off with. Raises ShardError as `read_shard`."""
    found = 0
    try:
        if tar.files.read(tar.path, 0, 2) == GZIP:
            raise ShardError(f"'{tar.name}' is compressed, and only plain tars are read; decompress it.")
        for group in tar.groups():
            found += 1
            yield group
    except SampleError as error:
        if not found:
            raise ShardError(
                f"'{tar.name}' is not a readable tar ({error.detail}); replace it or leave it out."
            ) from error
        yield error
    except OSError as error:
        raise ShardError(f"'{tar.name}' cannot be read: {error}.") from error
    if not found and tar.size > tarfile.RECORDSIZE:
        raise ShardError(f"'{tar.name}' holds no samples; replace it or leave it out.")


def read_entry(read: Read, position: int) -> Entry | None:
    """The entry whose header is at `position`; None where the tar ends.

    Raises:
        EOFError: the tar breaks off here.
        tarfile.TarError: the header is damaged.
    """
    header, start = read(position, BLOCK), position
    if not header and position > 0:  # without the blocks of zeros that should end a tar
        return None
    if len(header) < BLOCK:
        raise EOFError(f"breaks off at byte {position + len(header)}")
    if not header[0] and header.count(0) == BLOCK:
        return None
    # webdataset writes an extended header before each file, for the fraction of a second in its time.
    if header[156:157] == tarfile.XHDTYPE and (times := _pax_times(read, header, start)):
        start += times
        header = read(start, BLOCK)
    if (plain := _plain(header)) is not None:
        name, size = plain
        return Entry(name, start + BLOCK, size, start + BLOCK + _padded(size), start == position)
    return _by_tarfile(read, position)


def _pax_times(read: Read, header: bytes, position: int) -> int:
    """Bytes of an extended header that tells times alone, else 0."""
    if (fields := _checked(header)) is None or fields[1] > LARGEST_PAX:
        return 0
    records = read(position + BLOCK, fields[1])
    names = PAX_KEY.findall(records)
    return BLOCK + _padded(fields[1]) if names and PAX_TIMES.issuperset(names) else 0


def _plain(header: bytes) -> tuple[str, int] | None:
    """Name and size in an ordinary USTAR header of a file; None for anything else, which tarfile then reads.

    Only a short cut: `TarInfo.frombuf` takes 20 µs a member, a third of all the time of reading captions.
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
    # The checksum is the sum of all bytes, its own field counted as eight blanks. Adler-32's lower half is that sum
    # plus one, modulo its prime, and ten times as fast as adding in Python.
    counted = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    return (name, size) if size >= 0 and (counted - checksum) % ADLER_PRIME == 0 else None


def _by_tarfile(read: Read, position: int) -> Entry:
    try:
        with tarfile.open(fileobj=_Headers(read, position), mode="r:") as tar:  # type: ignore[arg-type]
            member = tar.next()
    except tarfile.TarError:
        raise
    except Exception as error:  # hostile headers make tarfile raise nearly anything
        raise tarfile.HeaderError(f"{type(error).__name__}: {error}") from error
    if member is None:
        raise EOFError(f"breaks off at byte {position}")
    if member.size < 0:
        raise tarfile.HeaderError(f"a size of {member.size} bytes")
    begin, refused = position + member.offset_data, ""
    if member.issparse():
        refused = "sparse"
    elif member.issym() or member.islnk():
        refused = f"a link to '{member.linkname}'"
    elif not member.isfile() and not member.isdir():
        refused = "a device or a pipe"
    # A name that is not UTF-8 could be neither logged nor compared.
    name = None if member.isdir() else member.name.encode(errors="backslashreplace").decode()
    size = member.size if member.isreg() else 0
    end = position + tar.offset if refused == "sparse" else begin + _padded(size)
    return Entry(name, begin, size, end, False, refused)


class _Headers(io.RawIOBase):
    """The tar from some header on, for `tarfile`. Raises OSError: more is asked for than a header may have."""

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
        if not 0 <= size <= LARGEST_HEADER:
            raise OSError(f"a header of {size} bytes; allowed are {LARGEST_HEADER}")
        content = self._read(self._origin + self._position, size)
        self._position += len(content)
        return content


def split_name(name: str) -> tuple[str | None, str]:
    """Member name → (key, suffix) as WebDataset divides them: at the first dot of the file name; (None, "") without."""
    match = KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else (None, "")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(suffixes: list[str], text: tuple[int, int]) -> tuple[int, int]:
    plain = len(set(suffixes)) == len(suffixes) and PLAIN_SUFFIXES.issuperset(suffixes)
    return text if plain else (0, -1)
