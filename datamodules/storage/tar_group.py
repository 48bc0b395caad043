"""Reading one tar group: the members of one sample, from where the index says that it begins."""

import io
import tarfile
import zlib
from collections.abc import Callable

from datamodules.storage.tar_index import BLOCK, LARGEST_HEADER

READ_AHEAD = 4 * 1024
LARGEST_BUFFER = 8 * 1024 * 1024
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
ADLER_PRIME = 65521
EMPTY_END = bytes(BLOCK - 345)


class RefusedEntryError(Exception):
    """An entry that is neither file nor folder, or whose data are not what they seem."""


class TarGroup:
    """A cursor over one tar group.

    Args:
        read: (size, offset) → bytes, fewer at the end of the tar.
        buffer: what was read of the group already.
    """

    def __init__(self, read: Callable[[int, int], bytes], begin: int, end: int, buffer: bytes):
        self.read, self.position, self.end, self.origin = read, begin, end, begin
        self.buffer = buffer

    def header(self) -> tuple[str | None, int]:
        """Name and size of the next member, or (None, 0) for a folder.

        Raises:
            EOFError: the tar breaks off here.
            tarfile.TarError: the header is damaged.
            RefusedEntryError: a link, a device, a sparse file.
        """
        header = self._bytes(BLOCK)
        if len(header) < BLOCK:
            raise EOFError(f"breaks off at byte {self.position + len(header)}")
        plain = plain_member(header)
        if plain is None:
            return self._extended()
        self.position += BLOCK
        return plain

    def _extended(self) -> tuple[str | None, int]:
        rest = io.BytesIO(self._bytes(min(self.end - self.position, LARGEST_HEADER)))
        try:
            with tarfile.open(fileobj=rest, mode="r:") as tar:
                member = tar.next()
        except (ValueError, OverflowError, RecursionError) as error:  # numbers that are none
            raise tarfile.HeaderError(str(error)) from error
        if member is None:
            raise EOFError("the group ends without a member")
        if member.size < 0:
            raise tarfile.HeaderError(f"a size of {member.size} bytes")
        if member.issparse() or not (member.isfile() or member.isdir()):
            target = f" to '{member.linkname}'" if member.linkname else ""
            raise RefusedEntryError(f"'{member.name}' is {_kind(member)}{target}; only files are read")
        self.position += member.offset_data
        # A name that is not UTF-8 could be neither logged nor compared.
        return (member.name.encode(errors="backslashreplace").decode(), member.size) if member.isfile() else (None, 0)

    def data(self, size: int) -> bytes:
        """The member's content; shorter than `size` where the tar breaks off."""
        content = self._bytes(size)
        self.skip(size)
        return content

    def skip(self, size: int) -> bytes:
        """Go past the member's content."""
        self.position += -(-size // BLOCK) * BLOCK
        return b""

    def _bytes(self, size: int) -> bytes:
        begin = self.position - self.origin
        if begin + size <= len(self.buffer):
            return self.buffer[begin : begin + size]
        return self.read(size, self.position)


def first_bytes(begin: int, end: int, whole: bool, remote: bool) -> int:
    """How much of a group to read at once. A request to a store costs more than the bytes that nobody needs."""
    return min(end - begin, LARGEST_BUFFER if whole or remote else READ_AHEAD)


def plain_member(header: bytes) -> tuple[str, int] | None:
    """Name and size in an ordinary USTAR header of a file; None for anything else, which tarfile then reads.

    Only a short cut: `TarInfo.frombuf` takes 20 µs a member, a third of all the time of reading captions.
    """
    if header[156:157] not in REGULAR or header[257:262] != b"ustar" or header[345:] != EMPTY_END:
        return None
    try:
        checksum, size = int(header[148:156].rstrip(b"\0 "), 8), int(header[124:136].rstrip(b"\0 "), 8)
        name = header[:100].rstrip(b"\0").decode("utf-8")
    except ValueError:
        return None
    if size < 0:
        return None
    # The checksum is the sum of all bytes, its own field counted as eight blanks. Adler-32's lower half is that sum
    # plus one, modulo its prime, and ten times as fast as adding in Python.
    counted = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    return (name, size) if (counted - checksum) % ADLER_PRIME == 0 else None


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "a link"
    return "sparse" if member.issparse() else "a device or a pipe"
