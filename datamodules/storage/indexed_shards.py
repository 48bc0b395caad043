"""Reading shards at random: sample number → the members of its tar group, by one read."""

import hashlib
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np

from datamodules.errors import SampleError, ShardError
from datamodules.images import Limits
from datamodules.storage.remote import RemoteConfig
from datamodules.storage.shard_files import LocalFile, RemoteFile, ShardFile
from datamodules.storage.shard_indexes import find_indexes, listed_shards
from datamodules.storage.shard_patterns import find_shards
from datamodules.storage.tar_group import RefusedEntryError, TarGroup, first_bytes, plain_member
from datamodules.storage.tar_index import BLOCK, ShardIndex, split_name

FETCHED_BYTES = 256 * 1024 * 1024


class IndexedShards:
    """The samples of many tars as one sequence of members. Safe to share with forked and spawned workers.

    Args:
        pattern: see `find_shards`.
        limits: members larger than `max_member_bytes` are refused unread.
        remote: object stores that the pattern may name.

    Attributes:
        contents, sizes: of each shard, a hash of what it holds and its number of samples.
        identity: a hash of all shards' names and contents.

    Raises:
        ShardError: no shards, something that is not a tar, or a shard that differs from its manifest.
    """

    def __init__(self, pattern: str, limits: Limits | None = None, remote: RemoteConfig | None = None):
        self.pattern, self.limits = pattern, limits or Limits()
        remote = remote or RemoteConfig()
        self.files = find_shards(pattern, remote)
        listed = listed_shards(pattern, self.files)
        indexes = find_indexes(self.files, listed, remote)
        self._bounds = [index.bounds for index in indexes]
        self._texts = [index.texts for index in indexes]
        self._starts = np.cumsum([0] + [len(index) for index in indexes]).tolist()
        self.contents = _contents(self.files, indexes, listed)
        self.sizes = [len(index) for index in indexes]
        self.identity = _identity(self.files, self.contents)
        self._fetched: OrderedDict[int, bytes | OSError] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """All members of sample `i`, suffix → bytes."""
        return self.read(i)[2]

    def read(self, i: int, suffixes: Container[str] | None = None) -> tuple[str, str, dict[str, bytes]]:
        """(shard name, key, members) of sample `i`.

        Args:
            suffixes: members that are wanted; the bytes of others are not read and they map to b"". None: all.

        Raises:
            SampleError: `unreachable_shard`, `truncated_tar`, `damaged_tar`, `member_too_large`, `duplicate_member`
                or `refused_member`.
            IndexError: no such sample.
        """
        file, begin, end = self._place(i)
        key, position = "", begin
        try:
            group = TarGroup(file.read, begin, end, self._first(i, file, begin, end, whole=suffixes is None))
            members: dict[str, bytes] = {}
            while (position := group.position) < end:
                name, size = group.header()
                if name is None:
                    continue
                key, suffix = split_name(name)
                if size > self.limits.max_member_bytes:
                    limit = self.limits.max_member_bytes
                    raise SampleError(
                        "member_too_large", file.name, key, f"'{suffix}' has {size} bytes, at most {limit}"
                    )
                if suffix in members:
                    raise SampleError("duplicate_member", file.name, key, f"'{suffix}' is there twice")
                wanted = suffixes is None or suffix in suffixes
                members[suffix] = group.data(size) if wanted else group.skip(size)
                if wanted and len(members[suffix]) != size:
                    detail = f"'{suffix}' breaks off after {len(members[suffix])} bytes"
                    raise SampleError("truncated_tar", file.name, key, detail)
        except (OSError, EOFError, tarfile.TarError, RefusedEntryError) as error:
            reason = next(name for kind, name in REASONS if isinstance(error, kind))
            raise SampleError(reason, file.name, key or f"at byte {position}", str(error)) from error
        return file.name, key, members

    def text(self, i: int) -> tuple[str, str, bytes] | None:
        """(shard name, key, txt) of sample `i` by one small read; None where `read` must look closer."""
        number = bisect_right(self._starts, i) - 1
        file, texts = self.files[number], self._texts[number]
        if texts is None or file.remote:
            return None
        place = i - self._starts[number]
        begin, size = texts.item(place, 0), texts.item(place, 1)
        if not 0 <= size <= self.limits.max_member_bytes:
            return None
        try:
            content = file.read(BLOCK + size, begin - BLOCK)
        except OSError:
            return None
        header = plain_member(content[:BLOCK])
        if header is None or header[1] != size or len(content) != BLOCK + size:
            return None
        return file.name, split_name(header[0])[0], content[BLOCK:]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Ask a store for these samples all at once, to be read next; nothing for local files."""
        first = self.files[0]
        if not isinstance(first, RemoteFile):
            return
        wanted = [i for i in dict.fromkeys(indices) if i not in self._fetched]
        for i, content in zip(wanted, first.store.each(_fetch, [self._place(i) for i in wanted]), strict=True):
            self._fetched[i] = content
        while sum(len(content) for content in self._fetched.values() if isinstance(content, bytes)) > FETCHED_BYTES:
            self._fetched.popitem(last=False)

    def _place(self, i: int) -> tuple[ShardFile, int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of '{self.pattern}' does not exist; there are {len(self)}.")
        number, place = self.locate(i)
        bounds = self._bounds[number]
        return self.files[number], bounds.item(place, 0), bounds.item(place, 1)

    def locate(self, i: int) -> tuple[int, int]:
        """Number of the shard that holds sample `i`, and its place there."""
        number = bisect_right(self._starts, i) - 1
        return number, i - self._starts[number]

    @property
    def paths(self) -> list[Path]:
        """The shards' files, for what lies beside them.

        Raises:
            ShardError: a shard is in an object store.
        """
        if remote := next((file for file in self.files if not isinstance(file, LocalFile)), None):
            raise ShardError(f"'{remote}' is in an object store, where nothing is kept beside shards.")
        return [file.path for file in self.files if isinstance(file, LocalFile)]

    def _first(self, i: int, file: ShardFile, begin: int, end: int, whole: bool) -> bytes:
        content = self._fetched.pop(i, None) if file.remote else None
        if isinstance(content, OSError):
            raise content
        return file.read(first_bytes(begin, end, whole, file.remote), begin) if content is None else content

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_fetched": OrderedDict()}


REASONS = (
    (tarfile.TarError, "damaged_tar"),
    (RefusedEntryError, "refused_member"),
    (EOFError, "truncated_tar"),
    (OSError, "unreachable_shard"),
)


def _fetch(place: tuple[ShardFile, int, int]) -> bytes | OSError:
    file, begin, end = place
    try:
        return file.read(first_bytes(begin, end, True, True), begin)
    except OSError as error:
        return error


def _contents(files: list[ShardFile], indexes: list[ShardIndex], listed: dict[str, dict]) -> list[str]:
    """A hash of each shard: its checksum where a manifest has it, else of where its samples lie."""
    return [
        listed[str(file)]["sha256"] if str(file) in listed else hashlib.sha256(index.places()).hexdigest()
        for file, index in zip(files, indexes, strict=True)
    ]


def _identity(files: list[ShardFile], contents: list[str]) -> str:
    """A hash of what is read: names and contents."""
    digest = hashlib.sha256()
    for file, content in zip(files, contents, strict=True):
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()
