"""Where the samples of a tar lie, so that any of them is one read away.

webdataset 1.0 reads tars as streams only (its random-access package `wids` is gone), hence this index. Tars that come
without one (img2dataset writes none) are scanned once with `tarfile` and the index is kept beside them.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datamodules.errors import ShardError
from datamodules.storage.shard_files import ShardFile

BLOCK = 512
WALK_BYTES = {False: 64 * 1024, True: 4 * 1024 * 1024}  # read at once from a disk and from a store
LARGEST_HEADER = 1024 * 1024
PLAIN_SUFFIXES = frozenset(("txt", "json", "jpg", "jpeg", "png", "webp"))
INDEX_SUFFIX = ".index.npy"


@dataclass
class ShardIndex:
    """Byte ranges of a shard's samples.

    Attributes:
        bounds: int64 N×2, begin and end of each tar group.
        size: of the tar.
        texts: int64 N×2, where the data of the sample's `txt` begin and their length, so that a caption alone is one
            small read; length -1 where the group has none, or is anything but plain files of the usual names. None in
            indexes of an older form.
    """

    bounds: np.ndarray
    size: int
    texts: np.ndarray | None = None

    @classmethod
    def scan(cls, file: ShardFile) -> "ShardIndex":
        """Walk through the headers of a tar.

        A tar that breaks off, or whose headers do at some place, keeps what follows as one last sample in the index:
        reading it then fails and is counted.

        Raises:
            ShardError: not a tar, or one without any sample.
        """
        groups: list[Group] = []
        try:
            for name, begin, end, data in _members(file):
                key, suffix = split_name(name) if name is not None else (None, "")
                if key is None or not groups or key != groups[-1].key:
                    groups.append(Group(key, begin, end))
                groups[-1].add(suffix, end, data)
        except (tarfile.TarError, OSError) as error:
            raise ShardError(f"'{file}' is not a readable tar ({error}); replace it or leave it out.") from error
        if not groups:
            raise ShardError(f"'{file}' holds no samples; replace it or leave it out.")
        rows = np.array([(group.begin, group.end, *group.text()) for group in groups], dtype=np.int64)
        return cls(rows[:, :2], file.size, rows[:, 2:])

    def to_bytes(self) -> bytes:
        """As a .npy file: one row (size, N, 0, 0), then bounds and texts side by side."""
        parts = [self.bounds] if self.texts is None else [self.bounds, self.texts]
        first = [self.size, len(self.bounds), 0, 0][: 2 * len(parts)]
        return _npy(np.vstack([first, np.hstack(parts)]))

    def places(self) -> bytes:
        """Size and bounds alone, by which samples are told from others."""
        return _npy(np.vstack([[self.size, len(self.bounds)], self.bounds]))

    @classmethod
    def read(cls, path: Path) -> "ShardIndex | None":
        """Read a file of what `to_bytes` gave; None if it is absent or is not an index."""
        try:
            return cls.from_bytes(path.read_bytes())
        except OSError:
            return None

    @classmethod
    def from_bytes(cls, content: bytes) -> "ShardIndex | None":
        """What `to_bytes` gave; None for anything else."""
        try:
            rows = np.load(io.BytesIO(content), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if rows.ndim != 2 or rows.shape[1] not in (2, 4) or len(rows) < 2 or rows[0, 1] != len(rows) - 1:
            return None
        return cls(rows[1:, :2], int(rows[0, 0]), rows[1:, 2:] if rows.shape[1] == 4 else None)

    def __len__(self) -> int:
        return len(self.bounds)


@dataclass
class Group:
    """The entries of one key, while a tar is walked through."""

    key: str | None
    begin: int
    end: int
    suffixes: list[str] = field(default_factory=list)
    texts: list[tuple[int, int]] = field(default_factory=list)

    def add(self, suffix: str, end: int, data: tuple[int, int] | None) -> None:
        """One more entry; `data` is (begin, length) of a plain file's."""
        self.end = end
        self.suffixes.append(suffix if data is not None else "")
        if suffix == "txt" and data is not None:
            self.texts.append(data)

    def text(self) -> tuple[int, int]:
        """See `ShardIndex.texts`."""
        plain = len(set(self.suffixes)) == len(self.suffixes) and PLAIN_SUFFIXES.issuperset(self.suffixes)
        return self.texts[0] if plain and self.texts else (0, -1)


def _members(file: ShardFile) -> Iterator[tuple[str | None, int, int, tuple[int, int] | None]]:
    """(name, begin, end, data) of each entry that is no folder; (None, begin, size, None) for an unreadable rest.

    `data` is (begin, length) of an ordinary file with an ordinary header, else None.
    """
    with tarfile.open(fileobj=Walk(file), mode="r:") as tar:  # type: ignore[arg-type]
        begin = 0  # opening the tar has read the first header already
        while True:
            try:
                member = tar.next()
                broken = member is not None and tar.offset <= begin  # a negative size would walk in circles
            except Exception:  # hostile headers make tarfile raise nearly anything
                if begin == 0:
                    raise
                member, broken = None, True
            tar.members.clear()  # type: ignore[attr-defined]  # a large shard's headers would all stay in memory
            if begin < file.size and (broken or (member is None and any(file.read(BLOCK, begin)))):
                yield None, begin, file.size, None
            if broken or member is None:
                return
            if not member.isdir():
                plain = member.isreg() and not member.issparse() and member.offset_data - begin == BLOCK
                yield member.name, begin, tar.offset, (member.offset_data, member.size) if plain else None
            begin = tar.offset


class Walk(io.RawIOBase):
    """A shard as a stream for walking through its headers: blocks that nobody asks for are never read.

    Raises:
        OSError: more than a header is asked for at once, which would be a hostile header's size.
    """

    def __init__(self, file: ShardFile):
        self.file, self.position, self.begin, self.block = file, 0, 0, b""
        self.size = WALK_BYTES[file.remote]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.file.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise OSError(f"a header of {size} bytes at byte {self.position}; allowed are {LARGEST_HEADER}")
        begin = self.position - self.begin
        if not 0 <= begin <= begin + size <= len(self.block):
            self.block, self.begin, begin = self.file.read(max(size, self.size), self.position), self.position, 0
        content = self.block[begin : begin + size]
        self.position += len(content)
        return content


def _npy(rows: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, rows, allow_pickle=False)
    return stream.getvalue()


def index_name(shard: str) -> str:
    """File name of the index that belongs to a shard."""
    return shard.removesuffix(".tar") + INDEX_SUFFIX


def index_path(shard: Path) -> Path:
    """The index that belongs to a shard on a disk."""
    return shard.with_name(index_name(shard.name))


def split_name(name: str) -> tuple[str, str]:
    """Member name → (key, suffix) as WebDataset divides them: at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()
