"""Read the input. It is divided into sources, each a shard or some files of a folder, which one task reads in order."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datamodules.curation.config import Input
from datamodules.curation.rows import Row, drop_for, new_row
from datamodules.errors import DataError, SampleError, ShardError
from datamodules.images import SUFFIXES, Limits
from datamodules.shards import find_tars
from datamodules.tar import read_shard


@dataclass(frozen=True)
class Source:
    """The shard `path`, or `files` in the folder `path`."""

    number: int
    path: str
    files: tuple[str, ...] = ()


def list_sources(config: Input) -> tuple[list[Source], str]:
    """Return the sources and a fingerprint of the input: names and sizes of shards, or the names of a folder's files.

    Raises:
        DataError: the input does not exist or is empty.
    """
    if config.shards is not None:
        paths = find_tars(config.shards)
        listed = [f"{path.name} {path.stat().st_size}" for path in paths]
        sources = [Source(number, str(path)) for number, path in enumerate(paths)]
    else:
        folder = Path(str(config.images))
        if not folder.is_dir():
            raise DataError(f"input.images='{folder}' is not a folder.")
        listed = list(_list_images(folder))
        if not listed:
            raise DataError(f"input.images='{folder}' contains no file that ends in {', '.join(SUFFIXES)}.")
        starts = range(0, len(listed), config.chunk_size)
        files = [tuple(listed[start : start + config.chunk_size]) for start in starts]
        sources = [Source(number, str(folder), some) for number, some in enumerate(files)]
    return sources, hashlib.sha256("\n".join(listed).encode("utf-8", "surrogateescape")).hexdigest()


def _list_images(folder: Path) -> Iterator[str]:
    """Yield the image files below a folder, without hidden ones, in an order that depends only on their names."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix[1:].lower() in SUFFIXES:
                yield str(Path(root, name).relative_to(folder))


def read_rows(source: Source, config: Input, *, given: bool) -> Iterator[Row]:
    """Yield a row for every image, in order. Unreadable images are dropped rows; an unreadable shard is one such row.

    Args:
        given: also read captions, and drop samples without one.
    """
    name = Path(source.path).name
    for file in source.files:
        row = new_row(name, file)
        try:
            yield row | {"data": _read_file(Path(source.path), file, config.limits)}
        except (OSError, SampleError) as error:
            reason = error if isinstance(error, SampleError) else SampleError("unreadable_file", name, file, str(error))
            yield drop_for(row, reason, "reading")
    if source.files:
        return
    try:
        for item in read_shard(source.path, config.limits):
            if isinstance(item, SampleError):
                yield drop_for(new_row(name, item.key), item, "reading")
                continue
            key, members = item
            row = new_row(name, key)
            try:
                yield row | _take(members, name, key, given)
            except SampleError as error:
                yield drop_for(row, error, "reading")
    except ShardError as error:
        yield drop_for(new_row(name, ""), SampleError("unreadable_shard", name, "", str(error)), "reading")


def _read_file(folder: Path, name: str, limits: Limits) -> bytes:
    path = (folder / name).resolve(strict=True)
    # Pipes would block and devices never end, and a link must not bring a file from outside into the data set.
    if not path.is_file() or not path.is_relative_to(folder.resolve()):
        raise SampleError("unreadable_file", folder.name, name, "only regular files inside the folder are read")
    if (size := path.stat().st_size) > limits.max_member_bytes:
        raise SampleError("member_too_large", folder.name, name, f"{size} bytes, at most {limits.max_member_bytes}")
    return path.read_bytes()


def _take(members: dict[str, bytes], shard: str, key: str, given: bool) -> Row:
    suffix = next((name for name in SUFFIXES if name in members), None)
    if suffix is None:
        raise SampleError("missing_member", shard, key, f"no {', '.join(SUFFIXES)} among {', '.join(members)}")
    if not given:
        return {"data": members[suffix]}
    if "txt" not in members:
        raise SampleError("missing_member", shard, key, "no txt, from which caption.by=given takes captions")
    try:
        caption = members["txt"].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("not_utf8", shard, key, f"txt: {error.reason} at byte {error.start}") from error
    return {"data": members[suffix], "caption": " ".join(caption.split())}
