"""Where the samples of a tar lie, so that any of them is one read away.

webdataset 1.0 reads tars as streams only (its random-access package `wids` is gone), hence this index. Tars that come
without one (img2dataset writes none) are scanned once with `tarfile` and the index is kept beside them.
"""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.errors import ShardError

BLOCK = 512
INDEX_SUFFIX = ".index.npy"


@dataclass
class ShardIndex:
    """Byte ranges of a shard's samples: `bounds` int64 N×2, begin and end of each tar group; `size` of the tar."""

    bounds: np.ndarray
    size: int

    @classmethod
    def from_bounds(cls, bounds: Sequence[tuple[int, int]], size: int) -> "ShardIndex":
        """From (begin, end) pairs."""
        return cls(np.array(bounds, dtype=np.int64).reshape(-1, 2), size)

    @classmethod
    def scan(cls, path: Path) -> "ShardIndex":
        """Walk through the headers of a tar.

        A tar that breaks off keeps its last, incomplete sample in the index: reading it then fails and is counted.

        Raises:
            ShardError: not a tar, or one without any sample.
        """
        size = path.stat().st_size
        bounds: list[list[int]] = []
        previous = None
        try:
            with tarfile.open(path, "r:") as tar:
                begin = 0  # opening the tar has read the first header already
                while True:
                    member = _next_member(tar)
                    if member is None:
                        if _is_damaged(path, begin):
                            bounds.append([begin, size])
                        break
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    key = split_name(member.name)[0] if member.isfile() else None
                    if key is not None and key != previous:
                        bounds.append([begin, end])
                    elif key is not None:
                        bounds[-1][1] = end
                    previous = key
                    begin = tar.offset
        except tarfile.TarError as error:
            raise ShardError(f"'{path}' is not a readable tar ({error}); replace it or leave it out.") from error
        if not bounds:
            raise ShardError(f"'{path}' holds no samples; replace it or leave it out.")
        return cls.from_bounds([(begin, end) for begin, end in bounds], size)

    def to_bytes(self) -> bytes:
        """As a .npy file: one row (size, N), then the bounds."""
        stream = io.BytesIO()
        np.save(stream, np.vstack([[self.size, len(self.bounds)], self.bounds]), allow_pickle=False)
        return stream.getvalue()

    @classmethod
    def read(cls, path: Path) -> "ShardIndex | None":
        """Read what `to_bytes` gave; None if it is absent or is not an index."""
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if rows.ndim != 2 or rows.shape[1:] != (2,) or len(rows) < 2 or rows[0, 1] != len(rows) - 1:
            return None
        return cls(rows[1:], int(rows[0, 0]))

    def __len__(self) -> int:
        return len(self.bounds)


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except tarfile.ReadError:
        if tar.offset == 0:
            raise  # not a tar at all
        return None  # the data of the member before breaks off
    finally:
        tar.members.clear()  # type: ignore[attr-defined]  # a large shard's headers would all stay in memory


def _is_damaged(path: Path, offset: int) -> bool:
    """Whether something other than the end mark stands where tarfile found no further header."""
    with open(path, "rb") as stream:
        stream.seek(offset)
        return any(stream.read(BLOCK))


def index_path(shard: Path) -> Path:
    """The index that belongs to a shard."""
    return shard.with_name(shard.name.removesuffix(".tar") + INDEX_SUFFIX)


def split_name(name: str) -> tuple[str, str]:
    """Member name → (key, suffix) as WebDataset divides them: at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()
