"""Reading shards at random: sample number → the members of its tar group, one `pread` each.

Only local files are read. A `pipe:` URL would run a shell command, so everything with a scheme is refused.
"""

import hashlib
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Container
from fnmatch import fnmatch
from glob import glob
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls

from datamodules.errors import SampleError, ShardError
from datamodules.images import Limits
from datamodules.tar_group import TarGroup
from datamodules.tar_index import ShardIndex, index_path, split_name

MANIFEST_PATTERN = "*.manifest.json"
OPEN_FILES = 64
SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


def expand_pattern(pattern: str) -> list[Path]:
    """A path, a glob or a brace list (`data/captions-{000000..000009}.tar`) → existing files, in order of name.

    Raises:
        ShardError: not a local path, or nothing is there.
    """
    if SCHEME.match(pattern) or "|" in pattern:
        raise ShardError(f"'{pattern}' is not a local path. Shards are read from local files only; copy or mount them.")
    paths: list[Path] = []
    for name in expand_urls(pattern):
        found = sorted(glob(name)) if any(character in name for character in "*?[") else [name]
        missing = [path for path in found if not Path(path).is_file()] if found else [name]
        if missing:
            raise ShardError(f"no shard at '{missing[0]}' (pattern '{pattern}'). {_what_is_there(Path(missing[0]))}")
        paths += map(Path, found)
    if not paths:
        raise ShardError("the pattern of shards is empty; give a path, a glob or a brace list.")
    return sorted(set(paths))


def _what_is_there(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"The folder '{folder}' does not exist."
    tars = sorted(entry.name for entry in folder.glob("*.tar"))
    shown = ", ".join(tars[:5]) + (f" and {len(tars) - 5} more" if len(tars) > 5 else "")
    return f"'{folder}' holds {shown}." if tars else f"'{folder}' holds no .tar file."


class IndexedShards:
    """The samples of many tars as one sequence of members. Safe to share with forked and spawned workers.

    Args:
        pattern: see `expand_pattern`.
        limits: members larger than `max_member_bytes` are refused unread.

    Raises:
        ShardError: no shards, something that is not a tar, or a shard that differs from its manifest.
    """

    def __init__(self, pattern: str, limits: Limits | None = None):
        self.pattern, self.limits = pattern, limits or Limits()
        self.paths = expand_pattern(pattern)
        manifest = _read_manifests({path.parent for path in self.paths})
        if lost := sorted(path for path in manifest if not path.is_file() and fnmatch(str(path), pattern)):
            raise ShardError(
                f"'{lost[0]}' is in its manifest but is missing (pattern '{pattern}'). {_what_is_there(lost[0])}"
            )
        indexes = [_find_index(path, manifest.get(path)) for path in self.paths]
        self._bounds = [index.bounds for index in indexes]
        self._starts = np.cumsum([0] + [len(index) for index in indexes]).tolist()
        self.contents = _contents(self.paths, indexes, manifest)
        self.sizes = [len(index) for index in indexes]
        self.identity = _identity(self.paths, self.contents)
        self._files: OrderedDict[int, int] = OrderedDict()

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
            SampleError: `truncated_tar`, `damaged_tar`, `member_too_large` or `duplicate_member`.
            IndexError: no such sample.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of '{self.pattern}' does not exist; there are {len(self)}.")
        number, place = self.locate(i)
        shard = self.paths[number].name
        begin, end = self._bounds[number][place].tolist()
        group = TarGroup(self._open(number), begin, end, whole=suffixes is None)
        key, members = "", {}
        while group.position < group.end:
            try:
                name, size = group.header()
            except (EOFError, tarfile.TarError) as error:
                reason = "truncated_tar" if isinstance(error, EOFError) else "damaged_tar"
                raise SampleError(reason, shard, key or f"at byte {group.position}", f"tar header: {error}") from error
            if name is None:  # a folder or another entry without data
                continue
            key, suffix = split_name(name)
            if size > self.limits.max_member_bytes:
                limit = self.limits.max_member_bytes
                raise SampleError("member_too_large", shard, key, f"'{suffix}' has {size} bytes, at most {limit}")
            if suffix in members:
                raise SampleError("duplicate_member", shard, key, f"'{suffix}' is there twice")
            wanted = suffixes is None or suffix in suffixes
            members[suffix] = group.data(size) if wanted else group.skip(size)
            if wanted and len(members[suffix]) != size:
                raise SampleError(
                    "truncated_tar", shard, key, f"'{suffix}' breaks off after {len(members[suffix])} bytes"
                )
        return shard, key, members

    def locate(self, i: int) -> tuple[int, int]:
        """Number of the shard that holds sample `i`, and its place there."""
        number = bisect_right(self._starts, i) - 1
        return number, i - self._starts[number]

    def _open(self, number: int) -> int:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        while len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        try:
            self._files[number] = os.open(self.paths[number], os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"shard '{self.paths[number]}' can no longer be opened: {error}.") from error
        return self._files[number]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict()}

    def __del__(self):
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def _find_index(path: Path, listed: dict | None) -> ShardIndex:
    """The index that the writer left, else one made now and kept beside the shard if the folder is writable."""
    size = path.stat().st_size
    index = ShardIndex.read(index_path(path))
    if listed is not None and size > listed["bytes"]:
        raise ShardError(
            f"'{path}' has {size} bytes but its manifest says {listed['bytes']}: it was written anew. Write the whole "
            f"set again, or remove the manifest to read the shard as it is."
        )
    # A shard shorter than its manifest says lost samples; the writer's index lets them be counted one by one.
    expected = listed["bytes"] if listed is not None else size
    if index is not None and index.size == expected and (listed is None or len(index) == listed["samples"]):
        return index
    index = ShardIndex.scan(path)
    partial = index_path(path).with_name(f"{index_path(path).name}.{os.getpid()}")
    try:
        partial.write_bytes(index.to_bytes())
        partial.replace(index_path(path))
    except OSError:
        partial.unlink(missing_ok=True)  # a read-only data folder: the index lives in memory alone
    return index


def _read_manifests(folders: set[Path]) -> dict[Path, dict]:
    listed = {}
    for manifest in sorted(path for folder in folders for path in folder.glob(MANIFEST_PATTERN)):
        try:
            for shard in json.loads(manifest.read_text(encoding="utf-8"))["shards"]:
                listed[manifest.parent / shard["name"]] = {name: shard[name] for name in ("samples", "bytes", "sha256")}
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"'{manifest}' is not a manifest of shards ({error!r}); write the set again.") from error
    return listed


def _contents(paths: list[Path], indexes: list[ShardIndex], manifest: dict[Path, dict]) -> list[str]:
    """A hash of each shard: its checksum where a manifest has it, else of where its samples lie."""
    return [
        manifest[path]["sha256"] if path in manifest else hashlib.sha256(index.to_bytes()).hexdigest()
        for path, index in zip(paths, indexes, strict=True)
    ]


def _identity(paths: list[Path], contents: list[str]) -> str:
    """A hash of what is read: names and contents."""
    digest = hashlib.sha256()
    for path, content in zip(paths, contents, strict=True):
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()
