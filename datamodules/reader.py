"""Read samples by their place in the order (datamodules/order.py).

A block's samples are located by reading on through the tar headers of its shards. Only their positions are stored, 48
bytes per sample; the content is read on request.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from datamodules.errors import SampleError, ShardError
from datamodules.images import Limits
from datamodules.order import Block, SampleOrder, shuffled
from datamodules.remote import Spool
from datamodules.sample import CaptionSample, Sample, decode
from datamodules.shards import ShardList
from datamodules.tar import GZIP, Group, OpenFiles, Tar

logger = logging.getLogger(__name__)

MAX_EPOCHS = 3  # whose permutations of a full shuffle are stored


class Located(NamedTuple):
    """Position of a sample: shard, number in the shard, and its group in the tar, None if it could not be found."""

    shard: int
    number: int
    group: Group | None


class SampleReader:
    """Reads the samples of a source by lane and number. Can be shared with forked and spawned workers.

    Args:
        shards: the source's shards.
        order: the order of their samples.
        kind: the kind of all samples; others are refused.
        suffixes: tar members to read; None reads all.
    """

    def __init__(
        self,
        shards: ShardList,
        order: SampleOrder,
        kind: str,
        limits: Limits,
        suffixes: frozenset[str] | None = None,
    ):
        self.shards, self.order, self.kind, self.limits, self.suffixes = shards, order, kind, limits, suffixes
        self.names = [url.partition("?")[0].rpartition("/")[2] for url in shards.urls]
        self.spool = None if shards.store is None else Spool(shards.store, shards.urls, shards.bytes)
        self._reset()

    def __call__(self, lane: int, number: int, attempt: int = 0) -> Sample:
        """Read sample `number` of a lane. Its images stay encoded.

        Args:
            attempt: above 0, read a replacement: the sample so many places further on in the same block, or in the
                next one when the whole block has been tried.

        Raises:
            SampleError: the sample cannot be used.
            ShardError: a shard is larger than its listing says.
        """
        located = self.locate(lane, number, attempt)
        key, members = self.members(located)
        return decode(members, self.names[located.shard], key, kind=self.kind, limits=self.limits)

    def caption(self, lane: int, number: int, attempt: int = 0) -> Sample:
        """Read a caption sample, without its image if that is faster. Arguments and errors as for `__call__`."""
        located = self.locate(lane, number, attempt)
        text = located.group and self._tar(located.shard).read_text(located.group, self.limits)
        if not text:
            return self(lane, number, attempt)
        key, content = text
        try:
            caption = content.decode("utf-8").strip()
        except UnicodeDecodeError:
            caption = ""
        name = self.names[located.shard]
        # `decode` raises the error that describes what is wrong.
        return CaptionSample(caption, None, key, name) if caption else decode({"txt": content}, name, key)

    def locate(self, lane: int, number: int, attempt: int = 0) -> Located:
        """Locate a sample. Raises ShardError if a shard is larger than its listing says."""
        block, place = self.order(lane, number)
        while attempt >= len(block) and not self.order.one_block:
            attempt -= len(block)
            number += len(block) - place
            block, place = self.order(lane, number)
        rows = self._rows(lane, block)
        shard, inside, begin, end, text, size = rows[(place + attempt) % len(rows)].tolist()
        return Located(shard, inside, Group(begin, end, text, size) if begin >= 0 else None)

    def members(self, located: Located) -> tuple[str, dict[str, bytes]]:
        """Return key and members of a located sample. Raises SampleError if it cannot be read."""
        if located.group is None:
            reason, detail = self._damage[located.shard]
            raise SampleError(reason, self.names[located.shard], f"number {located.number}", detail)
        return self._tar(located.shard).read(located.group.begin, located.group.end, self.limits, self.suffixes)

    def _rows(self, lane: int, block: Block) -> np.ndarray:
        """Positions of a block's samples in shuffled order, int64 N×6: shard, number, and the group's fields or -1."""
        # All lanes share a full shuffle, but may be in two different epochs of it.
        place = block.key if self.order.one_block else lane
        if (cached := self._blocks.get(place)) and cached[0] == block.key:
            return cached[1]
        if not self.order.one_block:
            rows = self._locate_block(lane, block)
        else:
            rows = self._all = self._locate_block(-1, block) if self._all is None else self._all
            if len(self._blocks) >= MAX_EPOCHS:
                self._blocks.pop(next(iter(self._blocks)))
        self._blocks[place] = block.key, rows[shuffled(len(block), *block.key)]
        return self._blocks[place][1]

    def _locate_block(self, lane: int, block: Block) -> np.ndarray:
        """Positions of a block's samples in the order of its slices, int64 N×6."""
        self._enter(lane, block)
        parts = []
        for shard, begin, end in block.slices:
            rows = np.full((end - begin, 6), -1, dtype=np.int64)
            rows[:, 0], rows[:, 1] = shard, np.arange(begin, end)
            groups = self._walk(lane, shard, begin, end)
            if groups:
                rows[: len(groups), 2:] = groups
            parts.append(rows)
        return np.concatenate(parts)

    def _enter(self, lane: int, block: Block) -> None:
        """Release the shards of the lane's last window; start to download those of this window and the next."""
        if self._windows.get(lane, (None, None))[0] == block.window:
            return
        self._windows[lane] = block.window, block.following
        for finished in [walk for walk in self._walks if walk[0] == lane and walk[1] not in block.window]:
            del self._walks[finished]
        if self.spool is not None:
            current = [shard for window, _ in self._windows.values() for shard in window]
            upcoming = [shard for _, following in self._windows.values() for shard in following]
            for path in self.spool.want([*current, *upcoming]):
                self._files.close(str(path))
            for shard in self._tars.keys() - set(current) - set(upcoming):
                del self._tars[shard]

    def _walk(self, lane: int, shard: int, begin: int, end: int) -> list[Group]:
        """Find groups `begin` … `end`-1 of a shard; fewer if it is truncated or cannot be read."""
        position, groups = self._walks.pop((lane, shard), (0, None))
        found: list[Group] = []
        try:
            if groups is None or position > begin:
                self._compare(shard)
                position, groups = 0, self._tar(shard).groups()
            for group in islice(groups, begin - position, end - position):
                found.append(group)
            if end == self.shards.samples[shard] and shard not in self._longer and next(groups, None) is not None:
                self._longer.add(shard)
                logger.warning(
                    "'%s' holds more than the %d samples that are listed; the others are not read. Delete its "
                    "record and its _stats.json and list it again with `kosmosg data index`",
                    self.shards.urls[shard], end,
                )  # fmt: skip
        except SampleError as error:
            self._damage[shard] = error.reason, f"{error.key}: {error.detail}"
        except OSError as error:
            self._damage[shard] = "unreachable_shard", str(error)
        else:
            if len(found) < end - begin:
                self._damage[shard] = "truncated_tar", f"ends before its {self.shards.samples[shard]} samples"
            self._walks[lane, shard] = end, groups
        return found

    def _compare(self, shard: int) -> None:
        """Raise an error if a shard is compressed or larger than listed."""
        tar, listed = self._tar(shard), int(self.shards.bytes[shard])
        if tar.files.read(tar.path, 0, 2) == GZIP:
            raise SampleError("damaged_tar", tar.name, "", "the file is compressed; decompress it")
        if tar.size > listed:
            raise ShardError(
                f"'{self.shards.urls[shard]}' has {tar.size} bytes but its listing says {listed}: it was written anew. "
                "Update the listing with `kosmosg data index`, or write the whole set again."
            )

    def _tar(self, shard: int) -> Tar:
        """Raises OSError if a remote shard cannot be downloaded."""
        if shard not in self._tars:
            path = self.shards.urls[shard] if self.spool is None else self.spool.path(shard)
            self._tars[shard] = Tar(path, self._files, self.names[shard])
            while self.spool is None and len(self._tars) > 1024:
                self._tars.popitem(last=False)
        return self._tars[shard]

    def _reset(self) -> None:
        self._files = OpenFiles()
        self._tars: OrderedDict[int, Tar] = OrderedDict()
        self._longer: set[int] = set()
        self._damage: dict[int, tuple[str, str]] = {}
        self._all: np.ndarray | None = None
        self._blocks: dict[Any, tuple[tuple[int, ...], np.ndarray]] = {}
        self._windows: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._walks: dict[tuple[int, int], tuple[int, Iterator[Group]]] = {}

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()
