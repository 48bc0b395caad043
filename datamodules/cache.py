"""Caches on disk: outputs of frozen networks, computed once and read by later runs instead of running the network.

    python train.py cache configs/instruction_tuning.yaml data.cached_latents=float32

writes `<shard>.<cache>-<hash>.safetensors` next to each shard. It contains the values of all items of the shard's
samples in order, where an item is a target image, an input image or a caption. Values of different shapes are stored
flat in one tensor, with their shapes in `<value>.shape` (zeros for items that could not be read). Files are
memory-mapped.

The header records the weights, the preprocessing, the precision and the shard; a mismatch is an error. The command
skips finished shards, and several commands can run at the same time and share the shards.
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

Identity = Mapping[str, str]
"""What a cache depends on apart from the samples, as text or hashes, with its name (`cache`) and its `precision`."""
Values = dict[str, Tensor]
Item = Callable[[], Any]
"""Returns the network's input for an item, or raises SampleError."""
Encode = Callable[[list[Any]], list[Values]]


class Cache:
    """Reads the cache of some shards, item by item. Can be shared with forked and spawned workers.

    Raises:
        ShardError: a shard has no cache of this identity; the message says what differs.
    """

    def __init__(self, shards: ShardList, identity: Identity):
        self.files = []
        for path, file, header in cache_files(shards, identity):
            if int(header["samples"]) and read_header(file) != header:
                raise ShardError(
                    f"'{path}' has no cache '{identity['cache']}' for this configuration. "
                    f"{_describe_caches(path, header)} Write it with: python train.py cache … and this run's "
                    "configuration, or set data.cached_… to null."
                )
            self.files.append(str(file))

    def __call__(self, shard: int, sample: int, item: int = 0) -> Values | None:
        """Return the values of an item of sample `sample`, floats as float32; None if the item could not be read."""
        opened = _open(self.files[shard])
        begin, end = opened.first[sample : sample + 2]
        if item >= end - begin:
            return None
        values = {name: value.read(opened.file, int(begin) + item) for name, value in opened.values.items()}
        return None if all(not value.numel() for value in values.values()) else values


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
    for key in opened.keys():  # noqa: SIM118 - not a dict
        if key.endswith(SHAPE):
            name, shapes = key.removesuffix(SHAPE), opened.get_tensor(key).numpy()
            values[name] = _Value(name, shapes.prod(axis=1).cumsum(), shapes)
    first = np.concatenate([[0], opened.get_tensor(COUNTS).numpy().cumsum()])
    return _Opened(opened, first, values)


def cache_files(shards: ShardList, identity: Identity) -> list[tuple[Path, Path, dict[str, str]]]:
    """Return, for each shard, its path, the path of its cache, and the expected header of the cache."""
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
    """Return the header of a cache file; None if the file is absent or damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata()
    except (SafetensorError, FileNotFoundError):
        return None


def _describe_caches(path: Path, wanted: dict[str, str]) -> str:
    """Describe how the existing caches of a shard differ from the wanted one."""
    messages = []
    for file in sorted(path.parent.glob(f"{path.name}.{wanted['cache']}-*.safetensors")):
        header = read_header(file)
        different = [
            f"{key} is {stored!s:.40} there and {wanted[key]:.40} here"
            for key in wanted
            if (stored := (header or {}).get(key)) != wanted[key]
        ]
        messages.append(f"In '{file.name}' {'; '.join(different)}." if header else f"'{file.name}' is damaged.")
    return " ".join(messages) or "The shard has none."


def write_cache(
    shards: ShardList,
    identity: Identity,
    items: Callable[[Sample], Sequence[Item]],
    encode: Encode,
    batch_size: int,
    limits: Limits,
) -> Counter[str]:
    """Write the cache of every shard that has none yet and that no other process is working on.

    Args:
        items: returns the items of a sample, as functions that decode them.
        encode: computes the values of a list of decoded items; all items have values of the same names.
        batch_size: items encoded at once.

    Returns:
        Counts of shards (`written`, `skipped`) and of items (`items`, of which `unusable`).

    Raises:
        DataError: some shards have no item that can be encoded. All other shards are written first.
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
            contents = _items(path, size, limits, items)
            try:
                while batch := list(islice(contents, batch_size)):
                    usable = [content for _, content in batch if content is not None]
                    encoded = iter(encode(usable) if usable else ())
                    for row, content in batch:
                        writer.add(row, None if content is None else next(encoded))
                if writer.items and not writer.usable:
                    raise DataError(f"no sample of '{path}' can be cached.")
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
    """Yield the sample number and content of each item of a shard. The content is None for an item that cannot be read;
    a sample that cannot be read counts as one such item."""
    for row, read in enumerate(islice(read_shard(path, limits), size)):
        try:
            if isinstance(read, SampleError):
                raise read
            key, members = read
            sample_items = items(decode(members, path.name, key, limits=limits))
        except SampleError as error:
            logger.warning("%s", error)  # training meets the same error and counts it
            yield row, None
            continue
        for item in sample_items:
            try:
                content = item()
            except SampleError as error:
                logger.warning("%s", error)
                content = None
            yield row, content


def _lock(shard: IO) -> bool:
    """Lock a shard; False if another process holds the lock. Without locks in the file system, two may do the same."""
    try:
        fcntl.flock(shard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


class _ShardCache:
    """Collects the items of a shard and writes its cache. Values are collected in unnamed temporary files, which vanish
    with the process, so that only one batch is in memory."""

    def __init__(self, stack: ExitStack, folder: Path, samples: int, dtype: torch.dtype):
        self.stack, self.folder, self.dtype = stack, folder, dtype
        self.counts = torch.zeros(samples, dtype=torch.int64)
        self.values: dict[str, tuple[IO[bytes], torch.dtype]] = {}
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.items = self.usable = 0

    def add(self, sample: int, values: Values | None) -> None:
        """Add the next item of a sample; `values` is None if it could not be read."""
        values = {
            name: value.to("cpu", self.dtype if value.is_floating_point() else value.dtype).contiguous()
            for name, value in (values or {}).items()
        }
        if not all(value.isfinite().all() for value in values.values()):
            logger.warning("sample %d: some values are not finite in %s, so it is not cached", sample, self.dtype)
            values = {}
        self.counts[sample] += 1
        self.items += 1
        self.usable += bool(values)
        for name, value in values.items():
            if name not in self.values:
                temporary = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - the stack closes it
                self.values[name] = self.stack.enter_context(temporary), value.dtype
                self.shapes[name] = [(0,) * value.ndim] * (self.items - 1)
            self.values[name][0].write(value.view(-1).view(torch.uint8).numpy().data)
            self.shapes[name].append(tuple(value.shape))
        if not values:
            for shapes in self.shapes.values():
                shapes.append((0,) * len(shapes[0]))

    def save(self, file: Path, header: dict[str, str]) -> None:
        """Write the safetensors file part by part; the library would need all values in memory."""
        entries: dict[str, Any] = {}
        parts: list[IO[bytes] | bytes] = []
        end = 0

        def add(name: str, dtype: torch.dtype, shape: list[int], size: int, content: IO[bytes] | bytes) -> None:
            nonlocal end
            entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [end, end + size]}
            end += size
            parts.append(content)

        add(COUNTS, torch.int64, [len(self.counts)], self.counts.nbytes, self.counts.numpy().tobytes())
        for name, rows in self.shapes.items():
            shapes = torch.tensor(rows, dtype=torch.int64)
            add(name + SHAPE, torch.int64, list(shapes.shape), shapes.nbytes, shapes.numpy().tobytes())
        # Tensors of the largest element size first, so that each begins at a multiple of its element size.
        for name, (values, dtype) in sorted(self.values.items(), key=lambda value: -value[1][1].itemsize):
            size = values.tell()
            values.seek(0)
            add(name, dtype, [size // dtype.itemsize], size, values)
        encoded = json.dumps({"__metadata__": header, **entries}).encode()
        encoded += b" " * (-len(encoded) % 8)
        with replaced(file) as temporary, open(temporary, "wb") as output:
            output.write(struct.pack("<Q", len(encoded)) + encoded)
            for part in parts:
                if isinstance(part, bytes):
                    output.write(part)
                else:
                    shutil.copyfileobj(part, output, 1 << 20)
