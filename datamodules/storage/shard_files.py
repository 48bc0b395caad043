"""A shard as bytes that can be read at any place: a local file or an object of a store."""

import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.errors import ShardError
from datamodules.storage.remote import ObjectStore

OPEN_FILES = 64
# What changes with an object's content, by the names that stores give it.
TAGS = ("ETag", "etag", "md5Hash", "content_md5", "crc32c", "LastModified", "last_modified", "Last-Modified", "mtime")


class LocalFile:
    """A shard on a mounted disk."""

    remote = False

    def __init__(self, path: Path, descriptors: "Descriptors"):
        self.path, self.name, self.descriptors = path, path.name, descriptors
        self._key = str(path)

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size

    def read(self, size: int, offset: int) -> bytes:
        """Bytes offset … offset+size-1, fewer at the end. Raises OSError."""
        return os.pread(self.descriptors.of(self._key), size, offset)

    def __str__(self) -> str:
        return self._key


class Descriptors:
    """Open files of one process, the least recently used closed first. `pread` keeps no position: forks may share."""

    def __init__(self):
        self._open: OrderedDict[str, int] = OrderedDict()

    def of(self, path: str) -> int:
        """A descriptor for reading. Raises OSError."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def __getstate__(self) -> dict:
        return {"_open": OrderedDict()}

    def __del__(self):
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


@dataclass
class RemoteFile:
    """A shard in an object store."""

    url: str
    store: ObjectStore
    listed: dict[str, Any] | None = None
    """What a manifest says of it: it then need not be asked for."""
    remote = True

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.partition("?")[0].rpartition("/")[2]

    @cached_property
    def size(self) -> int:
        """Bytes. Raises ShardError: there is no such object."""
        return self.listed["bytes"] if self.listed else self.info["size"]

    @cached_property
    def info(self) -> dict[str, Any]:
        """What the store knows. Raises ShardError: it cannot be asked, or has no such object."""
        try:
            info = self.store.info(self.url)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise ShardError(f"{'no shard at' if missing else 'cannot ask for'} '{self.url}': {error}.") from error
        if not info.get("size"):
            raise ShardError(f"'{self.url}' is empty, or its server does not tell its size.")
        return info

    def tag(self) -> str:
        """What changes when the content does: checksum, etag or time, as far as known."""
        if self.listed:
            return self.listed["sha256"]
        return next((str(self.info[name]) for name in TAGS if self.info.get(name)), "")

    def read(self, size: int, offset: int) -> bytes:
        """Bytes offset … offset+size-1, fewer at the end. Raises OSError."""
        end = min(offset + size, self.size)
        return self.store.read(self.url, offset, end) if end > offset else b""

    def __str__(self) -> str:
        return self.url


ShardFile = LocalFile | RemoteFile
