"""Caches on disk: what a frozen network makes of a sample, computed once and read in place of the network.

    python train.py cache configs/instruction_tuning.yaml data.cached_latents=float32

`<shard>.<cache>-<hash>.safetensors` beside each shard holds the values of its samples' items in their order: of the
target images, the input images or the caption. Values may have any shapes. They lie flat in one tensor, and
`<value>.shape` holds the shapes, zeros where an item could not be read. Files are mapped into memory, so that a reader
costs no more than what it reads.

Each file says what it is of: the network's weights, what was done before and after, and the shard. Anything else is
refused. Resumable: finished shards are skipped. Commands that run at the same time share the shards of a set.
"""

import fcntl
import hashlib
import json
import logging
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from datamodules.errors import DataError, SampleError, ShardError
from datamodules.images import Limits
from datamodules.sample import Sample, decode
from datamodules.shards import ShardList
from datamodules.tar import read_shard
from kosmosg.files import replaced

logger = logging.getLogger(__name__)

OPEN_FILES = 256
SHAPE, COUNTS = ".shape", "items"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL", torch.int64: "I64"}
OF_SHARD = ("shard", "samples", "bytes", "sha256")

Identity = Mapping[str, str]
"""What a cache depends on beside the samples, in words or hashes; `cache` is its name, `precision` the stored one."""
Values = dict[str, Tensor]
Item = Callable[[], Any]
"""Gives what the network reads of an item, or raises SampleError."""
Encode = Callable[[list[Any]], list[Values]]


class Cache:
    """What was cached of some shards, read item by item. Safe to share with forked and spawned workers.

    Raises:
        ShardError: a shard has no such cache, or one of other samples; says what differs.
    """

    def __init__(self, shards: ShardList, identity: Identity):
        self.files = []
        for path, file, header in cache_files(shards, identity):
            if int(header["samples"]) and read_header(file) != header:
                raise ShardError(
                    f"'{path}' has no cache '{identity['cache']}' of what this run would compute. "
                    f"{_what_is_there(path, header)} Write it with: python train.py cache … and this run's "
                    "configuration, or set data.cached_… to null."
                )
            self.files.append(str(file))

    def __call__(self, shard: int, sample: int, item: int = 0) -> Values | None:
        """Values of an item of sample `sample` of a shard, numbers in float32; None where it could not be read."""
        opened = _open(self.files[shard])
        first, last = opened.first[sample : sample + 2]
        if item >= last - first:
            return None
        found = {name: value.read(opened.file, int(first) + item) for name, value in opened.values.items()}
        return None if all(not value.numel() for value in found.values()) else found


class _Value(NamedTuple):
    name: str
    ends: np.ndarray
    shapes: np.ndarray

    def read(self, file: Any, item: int) -> Tensor:
        shape, end = self.shapes[item].tolist(), int(self.ends[item])
        flat = file.get_slice(self.name)[end - int(np.prod(shape)) : end]
        flat = flat.float() if flat.is_floating_point() else flat
        return flat.view(shape)


class _Opened(NamedTuple):
    file: Any
    first: np.ndarray
    values: dict[str, _Value]


@lru_cache(OPEN_FILES)
def _open(file: str) -> _Opened:
    opened = safe_open(file, "pt")
    values = {}
    for key in opened.keys():  # noqa: SIM118 - no dictionary
        if key.endswith(SHAPE):
            name, shapes = key.removesuffix(SHAPE), opened.get_tensor(key).numpy()
            values[name] = _Value(name, shapes.prod(axis=1).cumsum(), shapes)
    first = np.concatenate([[0], opened.get_tensor(COUNTS).numpy().cumsum()])
    return _Opened(opened, first, values)


def cache_files(shards: ShardList, identity: Identity) -> list[tuple[Path, Path, dict[str, str]]]:
    """Each shard, its file of the cache, and what that says of itself."""
    digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:8]
    return [
        (
            path,
            path.with_name(f"{path.name}.{identity['cache']}-{digest}.safetensors"),
            {**identity, "shard": path.name, "samples": str(samples), "bytes": str(size), "sha256": sha256},
        )
        for path, samples, size, sha256 in zip(
            shards.paths, shards.samples, shards.bytes, shards.checksums, strict=True
        )
    ]


def read_header(file: Path) -> dict[str, str] | None:
    """What a file says of itself; None if it is absent or damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata()
    except (SafetensorError, FileNotFoundError):
        return None


def _what_is_there(path: Path, wanted: dict[str, str]) -> str:
    """How the caches beside a shard differ from the wanted one."""
    told = []
    for file in sorted(path.parent.glob(f"{path.name}.{wanted['cache']}-*.safetensors")):
        header = read_header(file)
        different = [
            f"{key} is {found!s:.40} there and {wanted[key]:.40} here"
            for key in wanted
            if (found := (header or {}).get(key)) != wanted[key]
        ]
        told.append(f"In '{file.name}' {'; '.join(different)}." if header else f"'{file.name}' is damaged.")
    return " ".join(told) or "The shard has none."


def write_cache(
    shards: ShardList,
    identity: Identity,
    items: Callable[[Sample], Sequence[Item]],
    encode: Encode,
    batch_size: int,
    limits: Limits,
) -> Counter[str]:
    """Write the file of every shard that has none and that no other process works on.

    Args:
        items: of a sample, each decoded when its turn comes.
        encode: what was decoded → the values of each; every item has the same names.
        batch_size: items encoded at once.

    Returns:
        counts of shards `written` and `skipped`, of `items` and of those `unusable`.

    Raises:
        DataError: some shards hold nothing that could be encoded, after all others were written.
    """
    counts, failed, dtype = Counter(), [], getattr(torch, identity["precision"])
    for path, file, header in track(cache_files(shards, identity), identity["cache"]):
        size = int(header["samples"])
        if not size:
            continue
        with open(path, "rb") as shard, ExitStack() as stack:
            if not _lock(shard) or read_header(file) == header:
                counts["skipped"] += 1
                continue
            writer = _ShardCache(stack, file.parent, size, dtype)
            found = _items(path, size, limits, items)
            try:
                while batch := list(islice(found, batch_size)):
                    usable = [read for _, read in batch if read is not None]
                    encoded = iter(encode(usable) if usable else ())
                    for row, read in batch:
                        writer.add(row, None if read is None else next(encoded))
                if writer.items and not writer.usable:
                    raise DataError(f"'{path}' holds nothing that can be cached.")
            except DataError as error:
                failed.append(str(error))
                continue
            writer.save(file, header)
        counts.update(written=1, items=writer.items, unusable=writer.items - writer.usable)
    if failed:
        raise DataError(f"{len(failed)} shards have no cache (written: {counts['written']}). {failed[0]}")
    return counts


def _items(
    path: Path, size: int, limits: Limits, items: Callable[[Sample], Sequence[Item]]
) -> Iterator[tuple[int, Any]]:
    """Sample number and content of each item of a shard, None for one that cannot be read; in place of the items of a
    sample that cannot, one."""
    for row, read in enumerate(islice(read_shard(path, limits), size)):
        try:
            if isinstance(read, SampleError):
                raise read
            key, members = read
            found = items(decode(members, path.name, key, limits=limits))
        except SampleError as error:
            logger.warning("%s", error)  # the reader of the shards comes upon it, and counts it
            yield row, None
            continue
        for item in found:
            try:
                content = item()
            except SampleError as error:
                logger.warning("%s", error)
                content = None
            yield row, content


def _lock(shard: IO) -> bool:
    """Whether no other process works on a shard; where the file system has no locks, two may do the same work."""
    try:
        fcntl.flock(shard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


class _ShardCache:
    """The items of a shard on their way to its file. Their values wait in files without a name, which a killed process
    takes with it, so that memory holds one batch."""

    def __init__(self, stack: ExitStack, folder: Path, samples: int, dtype: torch.dtype):
        self.stack, self.folder, self.dtype = stack, folder, dtype
        self.counts = torch.zeros(samples, dtype=torch.int64)
        self.values: dict[str, tuple[IO[bytes], torch.dtype]] = {}
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.items = self.usable = 0

    def add(self, sample: int, values: Values | None) -> None:
        """The next item of a sample; None for one that could not be read."""
        values = {
            name: value.to("cpu", self.dtype if value.is_floating_point() else value.dtype).contiguous()
            for name, value in (values or {}).items()
        }
        if not all(value.isfinite().all() for value in values.values()):
            logger.warning("sample %d: not finite in %s, so it is not cached", sample, self.dtype)
            values = {}
        self.counts[sample] += 1
        self.items += 1
        self.usable += bool(values)
        for name, value in values.items():
            if name not in self.values:
                waiting = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - the stack closes it
                self.values[name] = self.stack.enter_context(waiting), value.dtype
                self.shapes[name] = [(0,) * value.ndim] * (self.items - 1)
            self.values[name][0].write(value.view(-1).view(torch.uint8).numpy().data)
            self.shapes[name].append(tuple(value.shape))
        if not values:
            for shapes in self.shapes.values():
                shapes.append((0,) * len(shapes[0]))

    def save(self, file: Path, header: dict[str, str]) -> None:
        """Write the safetensors file; its library would hold all of it in memory."""
        entries: dict[str, Any] = {}
        parts: list[IO[bytes] | bytes] = []
        end = 0

        def enter(name: str, dtype: torch.dtype, shape: list[int], size: int, content: IO[bytes] | bytes) -> None:
            nonlocal end
            entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [end, end + size]}
            end += size
            parts.append(content)

        enter(COUNTS, torch.int64, [len(self.counts)], self.counts.nbytes, self.counts.numpy().tobytes())
        for name, listed in self.shapes.items():
            shapes = torch.tensor(listed, dtype=torch.int64)
            enter(name + SHAPE, torch.int64, list(shapes.shape), shapes.nbytes, shapes.numpy().tobytes())
        # Largest numbers first, so that each begins at a multiple of its size.
        for name, (values, dtype) in sorted(self.values.items(), key=lambda value: -value[1][1].itemsize):
            size = values.tell()
            values.seek(0)
            enter(name, dtype, [size // dtype.itemsize], size, values)
        written = json.dumps({"__metadata__": header, **entries}).encode()
        written += b" " * (-len(written) % 8)
        with replaced(file) as temporary, open(temporary, "wb") as output:
            output.write(struct.pack("<Q", len(written)) + written)
            for part in parts:
                if isinstance(part, bytes):
                    output.write(part)
                else:
                    shutil.copyfileobj(part, output, 1 << 20)
