"""The input as chunks: what one output shard is made of. The images are read where a chunk is worked on."""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datamodules.curation.config import Input
from datamodules.curation.rows import Batch, Row, drop_for, new_row
from datamodules.errors import DataError, SampleError, ShardError
from datamodules.images import SUFFIXES, Limits
from datamodules.storage.indexed_shards import IndexedShards
from datamodules.storage.shard_patterns import expand_pattern

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Images `begin` … `end` - 1 of the shard `path`, or the `files` below the folder `path`."""

    number: int
    path: str
    begin: int = 0
    end: int = 0
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The whole input.

    Attributes:
        identity: hash of what is read; of a folder, the names of its files.
        unreadable_shards: files that are no tars; left out and told in the manifest.
    """

    chunks: list[Chunk]
    identity: str
    unreadable_shards: list[str] = field(default_factory=list)


def plan(config: Input, max_bad_share: float) -> Plan:
    """List the input and cut it into chunks; a chunk never spans two shards.

    Raises:
        DataError: nothing is there, or more than `max_bad_share` of the shards are unreadable.
    """
    return _plan_shards(config, max_bad_share) if config.shards is not None else _plan_folder(config)


def _plan_folder(config: Input) -> Plan:
    folder = Path(str(config.images))
    if not folder.is_dir():
        raise DataError(f"input.images '{folder}' is not a folder.")
    files = [str(path.relative_to(folder)) for path in _walk(folder)]
    if not files:
        raise DataError(f"input.images '{folder}' holds no file that ends in {', '.join(SUFFIXES)}.")
    size = config.chunk_size
    chunks = [
        Chunk(number, str(folder), files=tuple(files[begin : begin + size]))
        for number, begin in enumerate(range(0, len(files), size))
    ]
    return Plan(chunks, hashlib.sha256("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest())


def _walk(folder: Path) -> Iterator[Path]:
    """Image files below a folder, in an order that depends on their names alone."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(names) if Path(name).suffix[1:].lower() in SUFFIXES)


def _plan_shards(config: Input, max_bad_share: float) -> Plan:
    paths = expand_pattern(str(config.shards))
    chunks: list[Chunk] = []
    unreadable: list[str] = []
    digest = hashlib.sha256()
    for path in paths:
        try:
            shards = IndexedShards(str(path), config.limits)
        except ShardError as error:
            logger.warning("left out: %s", error)
            unreadable.append(path.name)
            continue
        digest.update(f"{path.name} {shards.identity}\n".encode())
        for begin in range(0, len(shards), config.chunk_size):
            end = min(begin + config.chunk_size, len(shards))
            chunks.append(Chunk(len(chunks), str(path), begin, end))
    if len(unreadable) > max_bad_share * len(paths):
        raise DataError(
            f"{len(unreadable)} of {len(paths)} shards of '{config.shards}' cannot be read (first '{unreadable[0]}'), "
            f"more than max_bad_share={max_bad_share:g}; mend them or leave them out of input.shards."
        )
    return Plan(chunks, digest.hexdigest(), unreadable)


def read_chunk(chunk: Chunk, config: Input, *, given: bool) -> Batch:
    """A row for every image, those that cannot be read already dropped.

    Args:
        given: read captions too; a sample without one is dropped.
    """
    if chunk.files:
        return [_file_row(i, Path(chunk.path), name, config.limits) for i, name in enumerate(chunk.files)]
    shards = IndexedShards(chunk.path, config.limits)
    return [_shard_row(i - chunk.begin, shards, i, given) for i in range(chunk.begin, chunk.end)]


def _file_row(number: int, folder: Path, name: str, limits: Limits) -> Row:
    row = new_row(number, folder.name, name)
    try:
        size = (folder / name).stat().st_size
        if size > limits.max_member_bytes:
            raise SampleError("member_too_large", folder.name, name, f"{size} bytes, at most {limits.max_member_bytes}")
        return row | {"data": (folder / name).read_bytes()}
    except OSError as error:
        return drop_for(row, SampleError("unreadable_file", folder.name, name, str(error)), "reading")
    except SampleError as error:
        return drop_for(row, error, "reading")


def _shard_row(number: int, shards: IndexedShards, index: int, given: bool) -> Row:
    # What is not asked for (a pickle, say) is not even read.
    suffixes = frozenset((*SUFFIXES, "txt") if given else SUFFIXES)
    row = new_row(number, shards.paths[0].name, f"number {index}")
    try:
        shard, key, members = shards.read(index, suffixes)
        row |= {"key": key}
        suffix = next((name for name in SUFFIXES if name in members), None)
        if suffix is None:
            raise SampleError("missing_member", shard, key, f"no {', '.join(SUFFIXES)} among {', '.join(members)}")
        row |= {"data": members[suffix]}
        return row | {"given": _caption(members, shard, key)} if given else row
    except SampleError as error:
        return drop_for(row | {"key": error.key}, error, "reading")


def _caption(members: dict[str, bytes], shard: str, key: str) -> str:
    if "txt" not in members:
        raise SampleError("missing_member", shard, key, "no txt, which caption.by=given takes the caption from")
    try:
        return " ".join(members["txt"].decode("utf-8").split())
    except UnicodeDecodeError as error:
        raise SampleError("not_utf8", shard, key, f"txt: {error.reason} at byte {error.start}") from error
